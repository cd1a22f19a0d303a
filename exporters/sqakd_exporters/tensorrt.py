"""A profile of TensorRT: files in the forms that its documentation asks for, never run in it.

No TensorRT is needed to write them, and none proves them: ONNX Runtime shows that a file is its
student, and :mod:`~sqakd_exporters.tensorrt_rules` checks it against each documented rule. Rule
numbers are those of ``docs/runtime-rules.md``.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError, SpecError
from sqakd_deploy.exporting import Artifact, ExportOptions, PlacementRules, RuleCheck
from sqakd_deploy.spec import QuantSpec
from sqakd_exporters.forms import as_conv, as_float, kept_in_float
from sqakd_exporters.pooling import with_padding_apart
from sqakd_exporters.qdq import EMITTERS, OPSETS, opset_for, weight
from sqakd_exporters.reals import RealWriter, real_bias, real_pad, real_select
from sqakd_exporters.saving import save_checked
from sqakd_exporters.tensorrt_forms import with_bounds_before
from sqakd_exporters.tensorrt_rules import SMALLEST_MATMUL, check_file
from sqakd_exporters.writer import Emitters, Writer


class TensorRtExporter:
    """QDQ ONNX of int8 alone, every quantizer a QuantizeLinear beside its DequantizeLinear."""

    name = "tensorrt"
    summary = "profile, not run in TensorRT: int8 QDQ ONNX, checked against its documented rules"
    runtime = "onnxruntime"
    deployed_in = "TensorRT"
    suffixes = (".onnx",)
    opsets = OPSETS
    placement = PlacementRules(
        fuse_sums=True,
        fuse_scaled=True,
        symmetric=True,
        quantize_output=False,
        smallest_matmul=SMALLEST_MATMUL,
    )

    def check(self, spec: QuantSpec) -> None:
        """Refuse placements that break the rules.

        Raises:
            SpecError: for ``placement: paper``.
        """
        if spec.placement != "target":
            raise SpecError(
                f"target {self.name!r}: wanted placement 'target', got {spec.placement!r}: it "
                "leaves residual sums without a quantised input (rule T8); leave --placement out"
            )

    def export(self, graph: g.IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        """Write the file, checked by onnx, whole or not at all.

        Raises:
            ExportError: if a node cannot be written, or has codes that do not fit int8 around 0,
                naming it; if the model does not pass onnx's checker; if the file cannot be written.
        """
        if options.input_type != "float32":
            raise ExportError(
                "input: TensorRT quantises no uint8 (rule T2), so that its files take prepared "
                "floats; leave --input out"
            )
        graph = with_bounds_before(with_padding_apart(graph))
        opset = opset_for(graph, options, OPSETS)
        model = RealWriter(graph, options, opset, _EMITTERS).model()
        return Artifact(path, self.name, save_checked(model, path))

    def conformance(self, path: Path) -> tuple[RuleCheck, ...]:
        """Every documented rule, read from a file.

        Raises:
            ExportError: if it is no ONNX file.
        """
        return check_file(path)


# -- writing ---------------------------------------------------------------------------------------


def _quantize(writer: Writer, node: g.Quantize) -> None:
    """QuantizeLinear by the step and DequantizeLinear by the grid's scale, nothing between (T7)."""
    grid = writer.graph.values[node.output].grid
    if grid is None:
        raise ExportError(f"node {node.name!r}: its output {node.output!r} has no grid")
    zero = writer.constant("zero", np.array(0, np.int8))
    step = writer.constant(f"{node.output}/step", np.array(node.step, np.float32))
    scale = step
    if node.step != grid.scale:
        scale = writer.constant(f"{node.output}/scale", np.array(grid.scale, np.float32))
    label = f"{node.output}/codes"
    codes = writer.op("QuantizeLinear", [*writer.real(node), step, zero], label, node.name)
    real = writer.op("DequantizeLinear", [codes, scale, zero], node.output)
    writer.hold(node, real, grid)


def _conv(writer: Writer, node: g.Conv) -> None:
    as_conv(writer, node, weight(writer, node), *real_bias(writer, node))


def _linear(writer: Writer, node: g.Linear) -> None:
    as_float(writer, node, "Gemm", weight(writer, node), *real_bias(writer, node), transB=1)


_EMITTERS: Emitters = MappingProxyType(
    {
        **EMITTERS,
        g.Quantize: _quantize,
        g.Conv: kept_in_float(_conv),
        g.Linear: kept_in_float(_linear),
        g.Pad: real_pad,
        g.Select: real_select,
    }
)

"""QONNX for FPGA flows: quantizers as nodes of their own, each with its bit-width.

The file computes in floats that lie on the student's grids; FINN and hls4ml read from its Quant
nodes how many bits each tensor has. QONNX's own executor proves it. The format: *QONNX:
Representing Arbitrary-Precision Quantized Neural Networks* (Pappalardo et al., 2022).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError, UnavailableError
from sqakd_deploy.exporting import Artifact, ExportOptions, PlacementRules, Session
from sqakd_deploy.spec import QuantSpec
from sqakd_exporters.floats import opset_needed, repeat_without_shape
from sqakd_exporters.forms import as_conv, as_float
from sqakd_exporters.joining import with_codes_joined
from sqakd_exporters.pooling import with_floors
from sqakd_exporters.qdq import EMITTERS, OPSETS
from sqakd_exporters.reals import RealWriter, real_bias, real_pad
from sqakd_exporters.saving import save_checked
from sqakd_exporters.writer import Emitters, Writer

DOMAIN = "qonnx.custom_op.general"
OPSET = 13  # what QONNX's own transformations expect; LayerNorm and GELU came later


class QonnxExporter:
    """QONNX files: float operators between IntQuant and BipolarQuant nodes.

    Raises:
        UnavailableError: if the package qonnx, which proves its files, is not installed.
    """

    name = "qonnx"
    summary = "QONNX for FPGA flows (FINN, hls4ml): weights and activations at their own bits"
    runtime = "qonnx"
    placement = PlacementRules()
    suffixes = (".onnx",)
    opsets = range(OPSET, OPSETS.stop)
    accumulator_bits = None  # hardware is built as wide as its sums are; the executor sums in float

    def __init__(self) -> None:
        _require_qonnx()

    def check(self, spec: QuantSpec) -> None:
        """Every spec that validates has a form: 1 to 8 bits, any registered method."""

    def export(self, graph: g.IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        """Write the file, checked by onnx, whole or not at all.

        Raises:
            ExportError: if a node cannot be written, naming it; if another opset is asked for than
                QONNX's own; if the model does not pass onnx's checker; if the file cannot be
                written.
        """
        if options.input_type != "float32":
            raise ExportError("input: QONNX files take prepared floats; leave --input out")
        opset = max(OPSET, opset_needed(graph, OPSETS[-1]))
        if options.opset not in (None, opset):
            raise ExportError(
                f"opset: this QONNX file has {opset}, got {options.opset}; leave it out"
            )
        writer = RealWriter(with_codes_joined(with_floors(graph)), options, opset, _EMITTERS)
        model = writer.model()
        model.opset_imports[DOMAIN] = 1
        return Artifact(path, self.name, save_checked(model, path))


class QonnxRuntime:
    """Opens QONNX files with QONNX's own executor, which runs node by node: exact and slow.

    Raises:
        UnavailableError: if the package qonnx is not installed.
    """

    name = "qonnx"
    stages: Mapping[str, bool] = MappingProxyType({"executor": True})
    exact_sums = True  # of floats

    def __init__(self) -> None:
        _require_qonnx()

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        """Load a file.

        Args:
            path: the file.
            optimize: changes nothing, the executor runs a file as written.
            threads: changes nothing.

        Raises:
            ExportError: if it is no QONNX file.
        """
        module = importlib.import_module("sqakd_exporters.qonnx_session")
        session: Session = module.QonnxSession(path)
        return session


def _require_qonnx() -> None:
    if find_spec("qonnx") is None:
        raise UnavailableError(
            "the package qonnx is not installed; pip install 'sqakd-deploy[qonnx]'"
        )


# -- writing ---------------------------------------------------------------------------------------


def code_range(low: int, high: int) -> tuple[int, bool]:
    """The fewest bits, and whether signed, that hold codes from ``low`` to ``high``."""
    if low >= 0:
        return max(1, high.bit_length()), False
    return max((-low - 1).bit_length(), high.bit_length()) + 1, True


def _quantize(writer: Writer, node: g.Quantize) -> None:
    """IntQuant; where the step is not the scale (EWGS), of the input in steps, then scaled."""
    grid = writer.graph.values[node.output].grid
    if grid is None:
        raise ExportError(f"node {node.name!r}: its output {node.output!r} has no grid")
    bits, signed = code_range(grid.qmin, grid.qmax)
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if (grid.qmin, grid.qmax) != limits:
        raise ExportError(
            f"node {node.name!r}: QONNX has ranges of whole bits alone, wanted {limits[0]} to "
            f"{limits[1]}, got {grid.qmin} to {grid.qmax}"
        )
    (x,) = writer.real(node)
    apart = node.step != grid.scale
    if apart:
        step = writer.constant(f"{node.output}/step", np.array(node.step, np.float32))
        x = writer.op("Div", [x, step], f"{node.output}/steps")
    scale = np.array(1.0 if apart else grid.scale, np.float32)
    label = f"{node.output}/codes" if apart else node.output
    zero = np.array(grid.zero_point, np.float32)
    output = _quant(writer, x, label, scale, zero, bits, signed=signed, node=node.name)
    if apart:
        out_scale = writer.constant(f"{node.output}/scale", np.array(grid.scale, np.float32))
        output = writer.op("Mul", [output, out_scale], node.output)
    writer.hold(node, output, grid)


def _quant(
    writer: Writer,
    x: ir.Value,
    name: str,
    scale: NDArray[np.float32],
    zero: NDArray[np.float32],
    bits: int,
    *,
    signed: bool,
    node: str | None = None,
) -> ir.Value:
    inputs = [
        writer.constant(f"{name}/quant/scale", scale),
        writer.constant(f"{name}/quant/zero_point", zero),
        writer.constant(f"{name}/quant/bits", np.array(bits, np.float32)),
    ]
    options: dict[str, Any] = {"signed": int(signed), "narrow": 0, "rounding_mode": "ROUND"}
    return writer.op("IntQuant", [x, *inputs], name, node, domain=DOMAIN, **options)


def _weight(writer: Writer, node: g.Conv | g.Linear) -> ir.Value:
    """Weights on their grid, and the node that says so.

    Odd codes of a mid-rise grid take a bit more than they carry: FPGA flows want zero-point 0. At
    1 bit they are BipolarQuant's −1 and 1.
    """
    name = f"{node.name}/weight"
    if not isinstance(node.weight, g.IntWeight):
        return writer.constant(name, node.weight)
    codes = node.weight.codes
    scale = node.weight.scale.reshape(-1, *[1] * (codes.ndim - 1))
    values = writer.constant(name, codes.astype(np.float32) * scale)
    if set(np.unique(codes)) <= {-1, 1}:
        inputs = [values, writer.constant(f"{name}/quant/scale", scale)]
        return writer.op("BipolarQuant", inputs, f"{name}/quant", domain=DOMAIN)
    lowest = -(2 ** (node.weight.bits - 1)) if not node.weight.mid_rise else 0
    bits, signed = code_range(min(int(codes.min()), lowest, -1), int(codes.max()))
    zero = np.array(0.0, np.float32)
    return _quant(writer, values, f"{name}/quant", scale, zero, bits, signed=signed)


def _conv(writer: Writer, node: g.Conv) -> None:
    as_conv(writer, node, _weight(writer, node), *real_bias(writer, node))


def _linear(writer: Writer, node: g.Linear) -> None:
    as_float(writer, node, "Gemm", _weight(writer, node), *real_bias(writer, node), transB=1)


_EMITTERS: Emitters = MappingProxyType(
    {
        **EMITTERS,
        g.Quantize: _quantize,
        g.Conv: _conv,
        g.Linear: _linear,
        g.Pad: real_pad,
        g.Repeat: repeat_without_shape,
    }
)

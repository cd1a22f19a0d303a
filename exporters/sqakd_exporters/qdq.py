"""Integer graphs as QDQ ONNX models.

Every node is written as its float operator between DequantizeLinear and QuantizeLinear, in the
forms that runtimes fuse into integer kernels. Comments name the rules of
``docs/runtime-rules.md`` that a form obeys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatchmethod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sqakd_deploy import __version__
from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import ExportOptions

OPSETS = range(13, 26)
"""Opsets that can be asked for; 13 brought DequantizeLinear per channel (rule 13)."""

_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
_NEWEST_IR_VERSION = 11

Array = NDArray[Any]


def build_model(graph: g.IntegerGraph, options: ExportOptions) -> ir.Model:
    """Write an integer graph as an ONNX model in memory.

    Args:
        graph: the integers.
        options: opset and names.

    Raises:
        ExportError: if the opset is out of range or a node has no ONNX form, naming it.
    """
    opset = OPSETS.start if options.opset is None else options.opset
    if opset not in OPSETS:
        raise ExportError(
            f"opset: wanted {OPSETS.start} to {OPSETS.stop - 1}, got {opset}; "
            "leave --opset out for the lowest that will do"
        )
    return _Writer(graph, options, opset).model()


class _Writer:
    """Writes each node once, in order; keeps the ONNX value that holds each graph value.

    A value on a grid is held as its integers. ``real`` dequantises it anew for every reader: a
    DequantizeLinear with one reader is what the fusions look for (rules 1 and 8).
    """

    def __init__(self, graph: g.IntegerGraph, options: ExportOptions, opset: int) -> None:
        self.graph = graph
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.held: dict[str, ir.Value] = {}
        source = graph.values[graph.input]
        self.input = ir.val(options.input_name, ir.DataType.FLOAT, _dims(source.shape))
        self.held[graph.input] = self.input
        self.output_name = options.output_name

    def model(self) -> ir.Model:
        """The finished model."""
        for node in self.graph.nodes:
            self.write(node)
        output = self._output()
        graph = ir.Graph(
            [self.input],
            [output],
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": self.opset},
            name=self.graph.name,
        )
        version = _IR_VERSIONS.get(self.opset, _NEWEST_IR_VERSION)
        model = ir.Model(
            graph, ir_version=version, producer_name="sqakd-deploy", producer_version=__version__
        )
        model.metadata_props.update(self.graph.metadata)
        return model

    def _output(self) -> ir.Value:
        """The graph's output in float, under the name asked for."""
        value = self.graph.values[self.graph.output]
        if value.grid is not None:
            output = self.real(value.name, self.output_name)
        else:
            output = self._op("Identity", [self.held[value.name]], self.output_name)
        output.shape = ir.Shape(_dims(value.shape))
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return output

    # -- building blocks ---------------------------------------------------------------------

    def _op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        output: str,
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        node = ir.node(
            op_type,
            inputs=inputs,
            attributes=attributes,
            name=name or f"{output}/{op_type}",
            outputs=[ir.Value(name=output)],
        )
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer; one that exists under the name is used again."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        return self.initializers[name]

    def _grid_constants(self, name: str, scale: np.float32, grid: g.Grid) -> list[ir.Value]:
        """Scale and zero-point, both rank 0 (rule 4), the zero-point explicit (rule 5)."""
        zero = np.array(grid.zero_point, dtype=grid.dtype)
        return [
            self.constant(f"{name}/scale", np.array(scale, np.float32)),
            self.constant(f"{name}/zero_point", zero),
        ]

    def real(self, name: str, output: str | None = None) -> ir.Value:
        """A graph value as floats, for one reader."""
        value, held = self.graph.values[name], self.held[name]
        if value.grid is None:
            return held
        readers = sum(1 for node in self.nodes if held in node.inputs)
        constants = self._grid_constants(f"{held.name}/dq", value.grid.scale, value.grid)
        label = output or f"{held.name}/real{readers or ''}"
        return self._op("DequantizeLinear", [held, *constants], label)

    def _weight(self, node: g.Conv | g.Linear) -> ir.Value:
        weight = node.weight
        if not isinstance(weight, g.IntWeight):
            return self.constant(f"{node.name}/weight", weight)
        return self._per_channel(f"{node.name}/weight", weight.codes, weight.scale)

    def _bias(self, node: g.Conv | g.Linear) -> list[ir.Value]:
        if node.bias is None:
            return []
        if not isinstance(node.bias, g.IntBias):
            return [self.constant(f"{node.name}/bias", node.bias)]
        return [self._per_channel(f"{node.name}/bias", node.bias.codes, node.bias.scale)]

    def _per_channel(self, name: str, codes: Array, scale: Array) -> ir.Value:
        """Constant integers with one scale per output channel, on axis 0 (rule 13)."""
        inputs = [
            self.constant(name, codes),
            self.constant(f"{name}/scale", scale),
            self.constant(f"{name}/zero_point", np.zeros(len(scale), codes.dtype)),
        ]
        return self._op("DequantizeLinear", inputs, f"{name}/real", axis=0)

    def _float(self, op_type: str, node: g.Node, *more: ir.Value, **attributes: Any) -> None:
        """A float operator on real values."""
        inputs = [self.real(name) for name in node.inputs]
        self.held[node.output] = self._op(
            op_type, [*inputs, *more], node.output, node.name, **attributes
        )

    def _moving(self, op_type: str, node: g.Node, *more: ir.Value, **attributes: Any) -> None:
        """An operator that only moves data, on the integers themselves where there are any."""
        held = self.held[node.inputs[0]]
        self.held[node.output] = self._op(
            op_type, [held, *more], node.output, node.name, **attributes
        )

    def _integers(self, name: str, values: Sequence[int]) -> ir.Value:
        return self.constant(name, np.array(values, np.int64))

    # -- nodes -------------------------------------------------------------------------------

    @singledispatchmethod
    def write(self, node: g.Node) -> None:
        """Write one node.

        Raises:
            ExportError: if its kind has no ONNX form here.
        """
        raise ExportError(
            f"node {node.name!r}: {type(node).__name__} has no ONNX form in this exporter"
        )

    @write.register
    def _quantize(self, node: g.Quantize) -> None:
        grid = self.graph.values[node.output].grid
        if grid is None:
            raise ExportError(f"node {node.name!r}: its output {node.output!r} has no grid")
        constants = self._grid_constants(f"{node.output}/q", node.step, grid)
        source = self.real(node.inputs[0])
        label = node.output if grid.fills_dtype else f"{node.output}/wide"
        value = self._op("QuantizeLinear", [source, *constants], label, node.name)
        if not grid.fills_dtype:  # rule 14: a Clip on the integers keeps every fusion
            bounds = [
                self.constant(f"clip_{grid.dtype}_{bound}", np.array(bound, grid.dtype))
                for bound in (grid.qmin, grid.qmax)
            ]
            value = self._op("Clip", [value, *bounds], node.output)
        self.held[node.output] = value

    @write.register
    def _conv(self, node: g.Conv) -> None:
        self._float(
            "Conv",
            node,
            self._weight(node),
            *self._bias(node),
            strides=node.stride,
            pads=node.padding,
            dilations=node.dilation,
            group=node.groups,
        )

    @write.register
    def _linear(self, node: g.Linear) -> None:
        self._float("Gemm", node, self._weight(node), *self._bias(node), transB=1)

    @write.register
    def _channel_affine(self, node: g.ChannelAffine) -> None:
        ones = np.ones_like(node.scale)
        statistics = [
            self.constant(f"{node.name}/scale", node.scale),
            self.constant(f"{node.name}/shift", node.shift),
            self.constant(f"{node.name}/mean", np.zeros_like(ones)),
            self.constant(f"{node.name}/variance", ones),
        ]
        self._float("BatchNormalization", node, *statistics, epsilon=0.0)

    @write.register
    def _clip(self, node: g.Clip) -> None:
        if (node.low, node.high) == (0.0, None):
            self._float("Relu", node)
            return
        high = np.inf if node.high is None else node.high
        bounds = [
            self.constant(f"{node.name}/{side}", np.array(bound, np.float32))
            for side, bound in (("low", node.low), ("high", high))
        ]
        self._float("Clip", node, *bounds)

    @write.register
    def _add(self, node: g.Add) -> None:
        self._float("Add", node)

    @write.register
    def _concat(self, node: g.Concat) -> None:
        self._float("Concat", node, axis=node.axis)

    @write.register
    def _average_pool(self, node: g.AveragePool) -> None:
        self._float(
            "AveragePool",
            node,
            kernel_shape=node.kernel,
            strides=node.stride,
            pads=node.padding,
            ceil_mode=int(node.ceil_mode),
            count_include_pad=int(node.count_include_pad),
        )

    @write.register
    def _global_average_pool(self, node: g.GlobalAveragePool) -> None:
        self._float("GlobalAveragePool", node)

    @write.register
    def _max_pool(self, node: g.MaxPool) -> None:
        self._moving(
            "MaxPool",
            node,
            kernel_shape=node.kernel,
            strides=node.stride,
            pads=node.padding,
            dilations=node.dilation,
            ceil_mode=int(node.ceil_mode),
        )

    @write.register
    def _reshape(self, node: g.Reshape) -> None:
        shape = self.graph.values[node.output].shape
        if len(shape) == 2:
            self._moving("Flatten", node, axis=1)
            return
        sizes = [0, *(extent or 0 for extent in shape[1:])]  # 0 keeps the batch
        self._moving("Reshape", node, self._integers(f"{node.name}/shape", sizes))

    @write.register
    def _transpose(self, node: g.Transpose) -> None:
        self._moving("Transpose", node, perm=node.perm)

    @write.register
    def _slice(self, node: g.Slice) -> None:
        ends = [np.iinfo(np.int64).max if end is None else end for end in node.ends]
        parts = {"starts": node.starts, "ends": ends, "axes": node.axes, "steps": node.steps}
        constants = [self._integers(f"{node.name}/{part}", v) for part, v in parts.items()]
        self._moving("Slice", node, *constants)

    @write.register
    def _pad(self, node: g.Pad) -> None:
        grid = self.graph.values[node.inputs[0]].grid
        # Real zero on a grid is its zero-point; that is what makes zero padding exact.
        zero = np.array(grid.zero_point, grid.dtype) if grid else np.array(0.0, np.float32)
        amounts = self._integers(f"{node.name}/amounts", [*node.before, *node.after])
        self._moving("Pad", node, amounts, self.constant(f"{node.name}/zero", zero))


def _dims(shape: g.Shape) -> list[int | str]:
    return ["N" if extent is None else extent for extent in shape]

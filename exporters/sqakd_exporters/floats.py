"""Operators without an integer kernel, as their ONNX operators on real values (rule 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError
from sqakd_exporters.forms import as_float, quantizers_behind
from sqakd_exporters.writer import Emitters, Writer

_OPERATORS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "elu": ("Elu", {}),
    "leaky_relu": ("LeakyRelu", {}),
    "reciprocal": ("Reciprocal", {}),
    "softplus": ("Softplus", {}),
    "sqrt": ("Sqrt", {}),
    "tanh": ("Tanh", {}),
}

WITHOUT_KERNEL = (
    "Div",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "LayerNormalization",
    "LogSoftmax",
    "PRelu",
    "Reciprocal",
    "ReduceL2",
    "ReduceMean",
    "ReduceSumSquare",
    "Softplus",
    "Sqrt",
    "Tanh",
)
"""Operators that no runtime here computes in integers; each lacks some more."""

GATES = {"Sigmoid": "SiLU", "HardSigmoid": "hard-swish"}
"""What ``x · gate(x)`` is called, by the gate's operator."""

_GATES = {"hard_swish": "hard_sigmoid", "silu": "sigmoid"}
"""Functions ``x · gate(x)``. HardSwish is an operator from opset 14 on, which ONNX Runtime takes
apart in the same way."""

_REDUCTIONS = {"length": "ReduceL2", "mean": "ReduceMean", "squares": "ReduceSumSquare"}

_GELU_OPSET, _LAYER_NORM_OPSET = 20, 17
_AXES_AS_INPUT = 18


def opset_needed(graph: g.IntegerGraph, limit: int) -> int:
    """The lowest opset that has every float operator of a graph; 0 if it has none.

    Args:
        graph: the graph.
        limit: the highest opset allowed.

    Raises:
        ExportError: if a node needs more than that, naming it.
    """
    lowest = 0
    for node in graph.nodes:
        opset = _opset(node)
        if opset > limit:
            kind = "LayerNorm" if isinstance(node, g.LayerNorm) else "GELU"
            raise ExportError(
                f"node {node.name!r}: {kind} needs opset {opset}, got {limit}; "
                "leave the opset out, or ask for a higher one"
            )
        lowest = max(lowest, opset)
    return lowest


def _opset(node: g.Node) -> int:
    if isinstance(node, g.Activation) and node.function.startswith("gelu"):
        return _GELU_OPSET
    if isinstance(node, g.LayerNorm):
        return _LAYER_NORM_OPSET
    return 0


def activation(writer: Writer, node: g.Activation) -> None:
    """One operator, or ``x · gate(x)``."""
    if node.function == "mish":
        _mish(writer, node)
        return
    gate = _GATES.get(node.function)
    if gate is None:
        operator, attributes = _OPERATORS[node.function]
        slope = {"alpha": node.slope} if operator in ("Elu", "LeakyRelu") else {}
        as_float(writer, node, operator, **attributes, **slope)
        return
    operator, attributes = _OPERATORS[gate]
    (source,) = writer.real(node)
    name = f"{node.name}/{gate}"
    factor = writer.op(operator, [source], f"{node.output}/{gate}", name, **attributes)
    writer.hold(node, writer.op("Mul", [source, factor], node.output, node.name), grid=None)


def _mish(writer: Writer, node: g.Activation) -> None:
    """Its parts, which every opset has."""
    (source,) = writer.real(node)
    name, output = f"{node.name}/softplus", f"{node.output}/softplus"
    soft = writer.op("Softplus", [source], output, name)
    gate = writer.op("Tanh", [soft], f"{node.output}/tanh", f"{node.name}/tanh")
    writer.hold(node, writer.op("Mul", [source, gate], node.output, node.name), grid=None)


def layer_norm(writer: Writer, node: g.LayerNorm) -> None:
    """LayerNormalization over the last axes."""
    constants = [
        writer.constant(f"{node.name}/{name}", values)
        for name, values in (("scale", node.scale), ("shift", node.shift))
    ]
    axis = -node.scale.ndim
    as_float(writer, node, "LayerNormalization", *constants, axis=axis, epsilon=node.epsilon)


def softmax(writer: Writer, node: g.Softmax) -> None:
    """Softmax, out of reach of ONNX Runtime's integer one, which is not exact (rule 10).

    That takes the place of DequantizeLinear → Softmax → QuantizeLinear; an Abs behind the Softmax,
    which changes nothing, keeps them apart. There is no integer LogSoftmax.
    """
    rank = len(writer.graph.values[node.output].shape)
    axis = node.axis if node.axis < 0 else node.axis - rank  # says itself which is the last
    if node.log:
        as_float(writer, node, "LogSoftmax", axis=axis)
        return
    result = writer.op("Softmax", writer.real(node), f"{node.output}/raw", node.name, axis=axis)
    if writer.grid(node) is not None:
        result = writer.op("Abs", [result], node.output, f"{node.name}/abs")
    writer.hold(node, result, grid=None)


def unit_length(writer: Writer, node: g.UnitLength) -> None:
    """The length, at least so much, and the quotient."""
    (source,) = writer.real(node)
    output, name = f"{node.output}/length", f"{node.name}/length"
    length = _reduced(writer, node, "ReduceL2", source, (node.axis,), output, name)
    least = writer.constant(f"{node.name}/epsilon", np.array(node.epsilon, np.float32))
    length = writer.op("Max", [length, least], f"{node.output}/divisor", f"{node.name}/divisor")
    writer.hold(node, writer.op("Div", [source, length], node.output, node.name), grid=None)


def reduce(writer: Writer, node: g.Reduce) -> None:
    """ReduceL2, ReduceSumSquare or ReduceMean; the axes stay."""
    (source,) = writer.real(node)
    kind = _REDUCTIONS[node.function]
    result = _reduced(writer, node, kind, source, node.axes, node.output, node.name)
    writer.hold(node, result, grid=None)


def _reduced(
    writer: Writer,
    node: g.Node,
    kind: str,
    source: ir.Value,
    axes: Sequence[int],
    output: str,
    name: str,
) -> ir.Value:
    if writer.opset < _AXES_AS_INPUT:
        return writer.op(kind, [source], output, name, axes=list(axes), keepdims=1)
    given = writer.integers(f"{node.name}/axes", axes)
    return writer.op(kind, [source, given], output, name, keepdims=1)


def divide(writer: Writer, node: g.Divide) -> None:
    """Div."""
    as_float(writer, node, "Div")


def resize(writer: Writer, node: g.Resize) -> None:
    """Resize, out of reach of older ONNX Runtimes' integer one, which cuts where it should round.

    That takes the place of DequantizeLinear → Resize → QuantizeLinear where both have one grid
    (onnxruntime #21319); a Max of one value behind the Resize, which changes nothing, keeps them
    apart.
    """
    scales = writer.constant(f"{node.name}/scales", np.array([1.0, 1.0, *node.scale], np.float32))
    mode = "align_corners" if node.align_corners else "half_pixel"
    inputs = [*writer.real(node), None, scales]
    attributes = {"mode": "linear", "coordinate_transformation_mode": mode}
    behind = quantizers_behind(writer.graph, node)
    result = writer.op("Resize", inputs, node.output, node.name, **attributes)
    if writer.grid(node) in [writer.graph.values[q.output].grid for q in behind]:
        result = writer.op("Max", [result], f"{node.output}/apart", f"{node.name}/apart")
    writer.hold(node, result, grid=None)


def matmul(writer: Writer, node: g.MatMul) -> None:
    """MatMul of two computed values."""
    as_float(writer, node, "MatMul")


def scale(writer: Writer, node: g.Scale) -> None:
    """Mul by a constant."""
    as_float(writer, node, "Mul", writer.constant(f"{node.name}/constant", node.constant))


def shift(writer: Writer, node: g.Shift) -> None:
    """Add of a constant."""
    as_float(writer, node, "Add", writer.constant(f"{node.name}/constant", node.constant))


def parametric_relu(writer: Writer, node: g.ParametricRelu) -> None:
    """PRelu."""
    as_float(writer, node, "PRelu", writer.constant(f"{node.name}/constant", node.constant))


def repeat(writer: Writer, node: g.Repeat) -> None:
    """Expand to the batch, which is read from the graph's input."""
    image = writer.held_value(writer.graph.input)
    shape = writer.op("Shape", [image], f"{node.output}/shape")  # a part of it needs opset 15
    first = writer.integers(f"{node.name}/first", [0])
    batch = writer.op("Gather", [shape, first], f"{node.output}/batch")
    rest = writer.integers(f"{node.name}/rest", np.shape(node.constant)[1:])
    sizes = writer.op("Concat", [batch, rest], f"{node.output}/sizes", axis=0)
    constant = writer.constant(f"{node.name}/constant", node.constant)
    writer.hold(node, writer.op("Expand", [constant, sizes], node.output, node.name), grid=None)


def repeat_without_shape(writer: Writer, node: g.Repeat) -> None:
    """Nothing times a pixel of each image, and the constant.

    For runtimes that computed shapes confuse: OpenVINO (rule O14) and QONNX's shape inference.
    """
    name, rank = node.name, np.ndim(node.constant)
    corner = [
        writer.integers(f"{name}/{part}", values)
        for part, values in (("start", [0] * 3), ("end", [1] * 3), ("axes", [1, 2, 3]))
    ]
    image = writer.held_value(writer.graph.input)
    pixel = writer.op("Slice", [image, *corner], f"{node.output}/pixel", f"{name}/pixel")
    shape = writer.integers(f"{name}/shape", [0] + [1] * (rank - 1))
    pixel = writer.op("Reshape", [pixel, shape], f"{node.output}/of_image")
    real = writer.op("Cast", [pixel], f"{node.output}/real", f"{name}/real", to=ir.DataType.FLOAT)
    zero = writer.constant(f"{name}/nothing", np.array(0.0, np.float32))
    nothing = writer.op("Mul", [real, zero], f"{node.output}/nothing", f"{name}/nothing")
    constant = writer.constant(f"{name}/constant", node.constant)
    writer.hold(node, writer.op("Add", [nothing, constant], node.output, name), grid=None)


FLOAT_EMITTERS: Emitters = MappingProxyType(
    {
        g.Activation: activation,
        g.LayerNorm: layer_norm,
        g.Softmax: softmax,
        g.UnitLength: unit_length,
        g.Divide: divide,
        g.Reduce: reduce,
        g.Resize: resize,
        g.MatMul: matmul,
        g.Scale: scale,
        g.Shift: shift,
        g.ParametricRelu: parametric_relu,
        g.Repeat: repeat,
    }
)
"""What each kind of float node becomes; read-only."""

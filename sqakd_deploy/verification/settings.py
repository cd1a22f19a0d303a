"""What operators are set to beside their weights: of a student, and of a file.

A wrong one may show in no image at hand, as GELU by tanh in place of the exact one, or hide in what
answers may be off, as a shifted padding. Only settings are here that every target writes alike; how
pools pad, for instance, is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from sqakd_deploy import graph as ir

PADDING, DILATION, ORDER = "padding", "dilation", "order of axes"
STRIDE, WINDOW, AXIS, INTERPOLATION = "stride", "window", "axis", "way of interpolating"
AMOUNTS, KIND, FILLER = "amounts of padding", "kind of padding", "what is padded with"
EPSILON, SLOPE, OFFSET, TANH = "epsilon", "slope", "value at 0", "computed by tanh"
FACTORS = {"alpha": "factor of products", "beta": "factor of the bias"}

STRIDED = "strided"
"""Last part of the name of a Slice that takes over a convolution's stride."""

Setting: TypeAlias = tuple[str, str, NDArray[Any]]
"""Name of a node in a file, what is set, and to what."""

_GATES = {"hard_sigmoid": "", "hard_swish": "/hard_sigmoid"}
"""What follows the name of a function in that of its node, where it has a HardSigmoid."""


_KINDS = ("constant", "reflect", "edge")
_COORDINATES = "coordinate_transformation_mode"
_INTERPOLATIONS = (("linear", "half_pixel"), ("linear", "align_corners"))


def settings_of(node: ir.Node) -> Iterator[Setting]:
    """What the operators of a node of the integer graph should be set to."""
    if isinstance(node, ir.Conv):
        yield node.name, PADDING, np.array(node.padding)
        yield node.name, DILATION, np.array(node.dilation)
        yield node.name, STRIDE, np.array(node.stride)
    elif isinstance(node, (ir.MaxPool, ir.AveragePool)):
        yield node.name, WINDOW, np.array(node.kernel)
        yield node.name, STRIDE, np.array(node.stride)
    elif isinstance(node, ir.Resize):
        yield node.name, INTERPOLATION, np.array(int(node.align_corners))
    elif isinstance(node, ir.Transpose):
        yield node.name, ORDER, np.array(node.perm)
    elif isinstance(node, ir.Pad):
        yield node.name, AMOUNTS, np.array([*node.before, *node.after])
        yield node.name, KIND, np.array(_KINDS.index(node.mode))
        if node.mode == "constant":
            yield node.name, FILLER, np.array(0.0)
    elif isinstance(node, (ir.LayerNorm, ir.UnitLength)):
        yield node.name, EPSILON, np.array(node.epsilon, np.float32)
    elif isinstance(node, ir.Activation) and node.function in ("elu", "leaky_relu"):
        yield node.name, SLOPE, np.array(node.slope, np.float32)
    elif isinstance(node, ir.Activation) and node.function in ("gelu", "gelu_tanh"):
        yield node.name, TANH, np.array(node.function == "gelu_tanh")
    elif isinstance(node, ir.Activation) and node.function in _GATES:
        name = node.name + _GATES[node.function]
        yield name, SLOPE, np.array(1 / 6, np.float32)
        yield name, OFFSET, np.array(0.5, np.float32)


_ATTRIBUTES: Mapping[str, Mapping[str, tuple[str, Any]]] = MappingProxyType(
    {
        "Conv": {
            "pads": (PADDING, [0] * 4),
            "dilations": (DILATION, [1] * 2),
        },
        "MaxPool": {"kernel_shape": (WINDOW, []), "strides": (STRIDE, [1] * 2)},
        "AveragePool": {"kernel_shape": (WINDOW, []), "strides": (STRIDE, [1] * 2)},
        "Transpose": {"perm": (ORDER, [])},
        "LayerNormalization": {"epsilon": (EPSILON, 1e-5)},
        "Elu": {"alpha": (SLOPE, 1.0)},
        "LeakyRelu": {"alpha": (SLOPE, 0.01)},
        "HardSigmoid": {"alpha": (SLOPE, 0.2), "beta": (OFFSET, 0.5)},
    }
)
"""Attributes by the operator: what they set, and what ONNX takes for granted."""


def settings_in(
    node: NodeProto,
    producer: Callable[[str], NodeProto | None],
    constant: Callable[[str], NDArray[Any] | None],
    zero_before: Callable[[NodeProto], float],
) -> Iterator[tuple[str, NDArray[Any]]]:
    """What a node of a file is set to.

    Args:
        node: the node.
        producer: gives the node that writes a value.
        constant: gives what a constant holds.
        zero_before: gives the zero-point of the codes that a node reads, 0 of reals.
    """
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for attribute, (name, usual) in _ATTRIBUTES.get(node.op_type, {}).items():
        value = np.array(given.get(attribute, usual))
        yield name, value.astype(np.float32) if value.dtype.kind == "f" else value
    if node.op_type == "Conv":
        stride = np.array(given.get("strides", [1, 1]))
        yield STRIDE, stride * _steps_before(node, producer, constant)
    elif node.op_type == "Resize":
        ways = given.get("mode", b"nearest"), given.get(_COORDINATES, b"half_pixel")
        way = tuple(text.decode() for text in ways)
        here = way in _INTERPOLATIONS
        yield INTERPOLATION, np.array(_INTERPOLATIONS.index(way) if here else -1)
    elif node.op_type == "Gelu":
        yield TANH, np.array(given.get("approximate") == b"tanh")
    elif node.op_type == "Gemm":  # no student has any, and a MatMul cannot
        factors = {name: given.get(attribute, 1.0) for attribute, name in FACTORS.items()}
        yield from ((name, np.array(value)) for name, value in factors.items() if value != 1)
    elif node.op_type == "Pad":
        amounts = constant(node.input[1])
        if amounts is not None:
            yield AMOUNTS, amounts
        kind = given.get("mode", b"constant").decode()
        yield KIND, np.array(_KINDS.index(kind) if kind in _KINDS else -1)
        filler = constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(())
        if kind == "constant" and filler is not None:
            yield FILLER, filler.astype(float) - zero_before(node)
    elif node.op_type == "Div":
        least = producer(node.input[1])  # of a length: see UnitLength
        if least is not None and least.op_type == "Max":
            known = [constant(name) for name in least.input]
            yield from ((EPSILON, value) for value in known if value is not None)


def _steps_before(
    node: NodeProto,
    producer: Callable[[str], NodeProto | None],
    constant: Callable[[str], NDArray[Any] | None],
) -> NDArray[Any]:
    """The stride of a convolution that a slice in front of it has taken over."""
    before = producer(node.input[0])
    if before is not None and before.op_type == "DequantizeLinear":
        before = producer(before.input[0])
    if before is None or not node.name or before.name != f"{node.name}/{STRIDED}":
        return np.ones(1, np.int64)
    steps = constant(before.input[4]) if len(before.input) > 4 else None
    return np.ones(1, np.int64) if steps is None else steps

"""Names and kinds of operators, by which those of a file are told to be its student's."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from types import MappingProxyType

from onnx import NodeProto

BOUNDING = ("Clip", "Max", "Min", "Relu")
NEARLY_NOTHING = (
    *("Ceil", "Celu", "Elu", "Floor", "LeakyRelu", "Mod", "Round", "Selu", "Shrink"),
    *("ThresholdedRelu", "Where"),
)
"""Leave most numbers as they are, or can."""
WITH_TERM = ("Add", "Div", "Mul", "Sub")

_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "abs": ("Abs",),
        "apart": ("Max",),
        "bounded": ("Clip",),
        "bounds": ("Clip",),
        "centred": ("Sub",),
        "divisor": ("Max",),
        "fill": ("Pad",),
        "hard_sigmoid": ("HardSigmoid",),
        "length": ("ReduceL2",),
        "nothing": ("Mul",),
        "pad": ("Pad",),
        "pixel": ("Slice",),
        "pooled": ("MaxPool",),
        "positive": ("Relu",),
        "reached": ("Slice",),
        "real": ("Add", "Cast"),
        "rounded": ("MaxPool",),
        "scaled": ("Div",),
        "sigmoid": ("Sigmoid",),
        "softplus": ("Softplus",),
        "steps": ("Div",),
        "strided": ("Slice",),
        "tanh": ("Tanh",),
    }
)
"""What else a node may be written as, by the last part of its name."""

_OF_QUANTIZER = ("Clip", "Mul")
"""Written behind a quantizer, without a last part of the name."""

_OF_CONCATENATION = ("Clip", "IntQuant", "QuantizeLinear", "Relu")
_SLICE = re.compile(r"\d+_\d+")


def is_part(node: NodeProto, known: Container[str]) -> bool:
    """Whether a node is one of those that a node of the student is written as.

    Args:
        node: of the file.
        known: names of the student's nodes.
    """
    name = node.name.removesuffix(f"/{node.op_type}")
    if name in known:
        return name != node.name and node.op_type in _OF_QUANTIZER
    base, _, last = name.rpartition("/")
    while base and base not in known:
        base = base.rpartition("/")[0]
    if not base:
        return False
    if last.isdecimal():
        return node.op_type in _OF_CONCATENATION
    if _SLICE.fullmatch(last):
        return node.op_type == "Slice"
    return node.op_type in _PARTS.get(re.sub(r"_\d+$", "", last), ())

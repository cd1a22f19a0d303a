"""Names and kinds of operators, by which those of a file are told to be its student's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from onnx import NodeProto

BOUNDING = ("Clip", "Max", "Min", "Relu")
NEARLY_NOTHING = (
    *("Ceil", "Celu", "Elu", "Floor", "LeakyRelu", "Mod", "Round", "Selu", "Shrink"),
    *("ThresholdedRelu", "Where"),
)
"""Leave most numbers as they are, or can."""
WITH_TERM = ("Add", "Div", "Mul", "Sub")

_GATED = ("Activation hard_swish", "Activation mish", "Activation silu")
_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "abs": ("Abs", ("Softmax",)),
        "apart": ("Max", ("Conv", "Linear", "Resize")),
        "bounded": ("Clip", ("Quantize",)),
        "bounds": ("Clip", ("Quantize",)),
        "centred": ("Sub", ("Normalize",)),
        "divisor": ("Max", ("UnitLength",)),
        "fill": ("Pad", ("Conv",)),
        "hard_sigmoid": ("HardSigmoid", _GATED),
        "length": ("ReduceL2", ("UnitLength",)),
        "pad": ("Pad", ("AveragePool", "MaxPool")),
        "pixel": ("Slice", ("Repeat",)),
        "pooled": ("MaxPool", ()),
        "positive": ("Relu", ("Clip", "Quantize")),
        "reached": ("Slice", ("AveragePool",)),
        "rounded": ("MaxPool", ()),
        "scaled": ("Div", ("Normalize",)),
        "sigmoid": ("Sigmoid", _GATED),
        "softplus": ("Softplus", _GATED),
        "strided": ("Slice", ("Conv",)),
        "tanh": ("Tanh", _GATED),
    }
)
"""What else a node may be written as, by the last part of its name: the operator, and of what kinds
of nodes it is a part, of any if none is named."""

_OF_CONCATENATION = ("Clip", "IntQuant", "QuantizeLinear", "Relu")
_SLICE = re.compile(r"\d+_\d+")


def is_part(node: NodeProto, known: Mapping[str, str]) -> bool:
    """Whether a node is one of those that a node of the student is written as.

    Args:
        node: of the file.
        known: what the student's nodes are, by their names; empty where that is not known.
    """
    name = node.name.removesuffix(f"/{node.op_type}")
    if name in known:  # the bounds of codes, right behind
        return name != node.name and node.op_type == "Clip" and known[name] in ("", "Quantize")
    base, _, last = name.rpartition("/")
    while base and base not in known:
        base = base.rpartition("/")[0]
    if not base:
        return False
    kind = known[base]
    if last.isdecimal():
        return node.op_type in _OF_CONCATENATION and kind in ("", "Clip", "Quantize")
    if _SLICE.fullmatch(last):
        return node.op_type == "Slice" and kind in ("", "Select")
    operator, kinds = _PARTS.get(re.sub(r"_\d+$", "", last), ("", ()))
    return node.op_type == operator and (not kinds or kind in ("", *kinds))

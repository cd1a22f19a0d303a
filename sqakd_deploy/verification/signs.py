"""What a QDQ file's values are known to be: constants, and whether they can be negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.onnx_layers import OnnxFile

_MOVING = (
    "Add",
    "AveragePool",
    "Concat",
    "Flatten",
    "Gather",
    "GlobalAveragePool",
    "MaxPool",
    "Mul",
    "Pad",
    "Reshape",
    "Resize",
    "Slice",
    "Transpose",
)
"""Operators that make nothing negative of what is not; shapes and amounts are not looked at."""

_SEVERAL = ("Add", "Concat", "Mul")
_POSITIVE = (
    *("Abs", "HardSigmoid", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid"),
    *("Softmax", "Softplus", "Sqrt"),
)


def number(file: OnnxFile, name: str) -> NDArray[Any] | None:
    """What a constant holds, or the reals that constant codes with one scale stand for."""
    producer = file.producer(name)
    if producer is None or producer.op_type != "DequantizeLinear":
        return file.constant(name)
    parts = [file.constant(part) for part in producer.input]
    known = [part.astype(np.float64) for part in parts if part is not None]
    if len(known) < len(parts) or any(part.size != 1 for part in known[1:]):
        return None
    code, scale, *zero = known
    real: NDArray[np.float64] = (code - sum(zero)) * scale
    return real


def never_negative(file: QdqFile, name: str) -> bool:
    """Whether a value of a file cannot be negative, from the operators that make it."""
    node, known = file.producer(name), number(file, name)
    if known is not None:
        return bool((known >= 0).all())
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        return _codes_never_negative(file, node.input[0])
    if node.op_type == "Clip":
        low = file.constant(node.input[1]) if len(node.input) > 1 else None
        return low is not None and bool(low >= 0)
    if node.op_type in _MOVING:
        return all(never_negative(file, source) for source in _sources(node))
    return node.op_type in _POSITIVE


def _codes_never_negative(file: QdqFile, name: str) -> bool:
    node = file.producer(name)
    if node is None:
        return False
    if node.op_type in (*_MOVING, "Clip"):
        return all(_codes_never_negative(file, source) for source in _sources(node))
    if node.op_type != "QuantizeLinear":
        return False
    facts: Mapping[str, np.ndarray] = file.constants.get(node.name, {})
    lowest = c.LOWEST in facts and int(facts[c.LOWEST]) >= int(facts[c.ZERO_POINT])
    return lowest or never_negative(file, node.input[0])


def _sources(node: NodeProto) -> Sequence[str]:
    """What a node takes from values, shapes, amounts and bounds left out."""
    return list(node.input) if node.op_type in _SEVERAL else list(node.input[:1])

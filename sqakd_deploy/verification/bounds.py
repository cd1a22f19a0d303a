"""Bounds, terms and factors of a file that no layer of its student explains.

Which images reach a bound is not known: it may hide behind all that are at hand; so may a term or
factor that moves values by less than rounding. Those that the student has are compared with its own
(:mod:`~sqakd_deploy.verification.constants`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from sqakd_deploy.pixels import PREPROCESSING_KEY
from sqakd_deploy.verification.constants import Difference
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.kinds import BOUNDING, NEARLY_NOTHING, WITH_TERM, is_part
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.signs import never_negative, number

_IDLE_WITH_ZERO = ("Add", "Mul")
"""ONNX Runtime rounds codes anew by adding nothing; OpenVINO counts images by nothing times one
(rule O14)."""


def other_bounds(file: OnnxFile, expected: Mapping[str, str]) -> Iterator[Difference]:
    """Operators that bound what depends on the images, and that the student has not.

    Args:
        file: whose.
        expected: what the student's layers are, by their names; empty where that is not known.
    """
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in file.model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for node in file.model.graph.node:
        bounding = node.op_type in BOUNDING
        if not (bounding or node.op_type in NEARLY_NOTHING) or _is_constant(file, node):
            continue
        explained = bounding and (
            _of_neighbour(file, node, readers[node.output[0]]) or _cuts_nothing(file, node)
        )
        if not explained and not _of_student(node, expected):
            what = f"the student has no {node.op_type} {place(file, node)}"
            yield Difference(node.name or node.output[0], "layer", 1, 1, what)


def other_terms(
    file: OnnxFile, expected: Mapping[str, str], *, whole: bool = False
) -> Iterator[Difference]:
    """Sums and products with a constant that the student has not, and others if all are known.

    None is what changes nothing (:data:`_IDLE_WITH_ZERO`), nor what the metadata say that raw
    pixels are prepared by.

    Args:
        file: whose.
        expected: what the student's layers are, by their names; empty where that is not known.
        whole: these are all its nodes, and not only those that have constants.
    """
    for node in file.model.graph.node:
        if node.op_type not in WITH_TERM or _is_constant(file, node):
            continue
        if _of_student(node, expected) or file.factors().intersection(node.output):
            continue
        constants = [name for name in node.input if not file.depends(name)]
        if not (constants or whole):
            continue
        known = [number(file, name) for name in constants]
        if any(value is not None and _prepares(file, node, value) for value in known):
            continue
        if node.op_type in _IDLE_WITH_ZERO and any(_is_nothing(file, n) for n in node.input):
            continue
        what = f"the student has no such {node.op_type} {place(file, node)}"
        yield Difference(node.name or node.output[0], "layer", 1, 1, what)


def _is_constant(file: OnnxFile, node: NodeProto) -> bool:
    return not file.depends(node.output[0])


def _of_student(node: NodeProto, expected: Mapping[str, str]) -> bool:
    """Whether it has a layer's name, or is a part of one."""
    return node.name in expected or is_part(node, expected)


def _prepares(file: OnnxFile, node: NodeProto, constant: NDArray[np.float32]) -> bool:
    """Whether it is a step of what the metadata say that raw pixels are prepared by."""
    stated = file.stated(PREPROCESSING_KEY)
    if not file.takes_pixels or not isinstance(stated, dict):
        return False
    steps = [("Div", [255.0]), ("Sub", stated.get("mean")), ("Div", stated.get("std"))]
    return any(node.op_type == kind and _is_by_channel(constant, v) for kind, v in steps)


def _is_by_channel(constant: NDArray[np.float32], stated: object) -> bool:
    """Whether a constant is what is stated for each channel of images, spread over them or not."""
    wanted = np.array(stated, np.float32).reshape(-1, 1, 1)
    try:
        got, wanted = np.broadcast_arrays(constant, wanted)
    except ValueError:  # of another count of channels
        return False
    return np.array_equal(got, wanted)


def _of_neighbour(file: OnnxFile, node: NodeProto, readers: Collection[NodeProto]) -> bool:
    """Whether it is compared with what is before or behind it: of codes, of what is rounded next
    (if it has a name to be found by), or of a length before it divides."""
    before = _before(file, node)
    if before is not None and before.name in file.quantizers and isinstance(file, QdqFile):
        return file.clip_behind(before) is node
    if node.op_type == "Max":
        return bool(readers) and all(reader.op_type == "Div" for reader in readers)
    rounded = bool(readers) and all(reader.name in file.quantizers for reader in readers)
    return rounded and bool(node.name) and node.op_type != "Min"


def _is_nothing(file: OnnxFile, name: str) -> bool:
    """Whether a constant is zero; as a code, 0 of scale 1: a kernel sums in steps of its output,
    where a large scale does not cancel."""
    producer = file.producer(name)
    if producer is None or producer.op_type != "DequantizeLinear":
        value = file.constant(name)
        return value is not None and not value.any()
    parts = [file.constant(part) for part in producer.input]
    found = [float(part.item()) for part in parts if part is not None and part.size == 1]
    return found == [0.0, 1.0, 0.0]


def _cuts_nothing(file: OnnxFile, node: NodeProto) -> bool:
    """Whether it is a ReLU of what is not negative, by which OpenVINO rounds codes at once."""
    if not isinstance(file, QdqFile) or node.op_type != "Relu":
        return False
    return never_negative(file, node.input[0])


def _before(file: OnnxFile, node: NodeProto) -> NodeProto | None:
    """The node that writes what one reads of the images."""
    sources = (name for name in node.input if file.depends(name))
    source = next(sources, None)  # none of a node whose graphs read the images
    return None if source is None else file.producer(source)


def place(file: OnnxFile, node: NodeProto) -> str:
    """Behind which of the nodes that have a name."""
    before = _before(file, node)
    while before is not None and not before.name:
        before = _before(file, before)
    return "of the input" if before is None else f"behind {before.name}"

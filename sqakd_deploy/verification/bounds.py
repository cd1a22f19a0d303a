"""Bounds of a file that no layer of its student explains.

Which images reach one is not known: it may hide behind all that are at hand. Those that the student
has are compared with its own (:mod:`~sqakd_deploy.verification.constants`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

from onnx import NodeProto

from sqakd_deploy.verification.constants import Difference
from sqakd_deploy.verification.onnx_layers import OnnxFile

_BOUNDING = ("Clip", "Max", "Min", "Relu")


def other_bounds(file: OnnxFile, expected: Collection[str]) -> Iterator[Difference]:
    """Operators that bound what depends on the images, and that the student has not.

    Args:
        file: whose.
        expected: names of the student's layers.
    """
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in file.model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for node in file.model.graph.node:
        if node.op_type not in _BOUNDING or file.constant(node.output[0]) is not None:
            continue
        own = {node.name, node.name.rpartition("/")[0]}  # of parts: see constants.parts_of
        if own.isdisjoint(expected) and not _of_neighbour(file, node, readers[node.output[0]]):
            what = f"the student has no {node.op_type} {_place(file, node)}"
            yield Difference(node.name or node.output[0], "layer", 1, 1, what)


def _of_neighbour(file: OnnxFile, node: NodeProto, readers: Collection[NodeProto]) -> bool:
    """Whether it is compared with what is before or behind it: of codes, of what is rounded next
    (if it has a name to be found by), or of a length before it divides."""
    before = _before(file, node)
    if before is not None and before.name in file.quantizers:
        return True
    if node.op_type == "Max":
        return bool(readers) and all(reader.op_type == "Div" for reader in readers)
    rounded = bool(readers) and all(reader.name in file.quantizers for reader in readers)
    return rounded and bool(node.name) and node.op_type != "Min"


def _before(file: OnnxFile, node: NodeProto) -> NodeProto | None:
    """The node that writes what one reads of the images."""
    source = next(name for name in node.input if name and file.constant(name) is None)
    return file.producer(source)


def _place(file: OnnxFile, node: NodeProto) -> str:
    """Behind which of the nodes that have a name."""
    before = _before(file, node)
    while before is not None and not before.name:
        before = _before(file, before)
    return "of the input" if before is None else f"behind {before.name}"

"""What depends on what in an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnx import AttributeProto, NodeProto

_OF_SHAPE = ("Shape", "Size")
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def has_graph(node: NodeProto) -> bool:
    """Whether a node has a graph of its own, which may read more than the node's inputs."""
    return any(attribute.type in _GRAPHS for attribute in node.attribute)


def dependent(nodes: Sequence[NodeProto], inputs: set[str]) -> set[str]:
    """Values that depend on what the inputs hold."""
    found = set(inputs)
    for node in nodes:  # in topological order
        if node.op_type not in _OF_SHAPE and found.intersection(_read_by(node)):
            found.update(node.output)
    return found


def used(nodes: Sequence[NodeProto], outputs: Iterable[str]) -> set[str]:
    """Values that the outputs depend on, and these."""
    found = set(outputs)
    for node in reversed(nodes):
        if found.intersection(node.output):
            found.update(_read_by(node))
    return found


def _read_by(node: NodeProto) -> Iterator[str]:
    """What a node reads, graphs of its own included."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)

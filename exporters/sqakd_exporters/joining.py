"""A pass: concatenations that are rounded behind them, as concatenations of codes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sqakd_deploy import graph as g


def with_codes_joined(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Round each input of a concatenation on the grid of its output, instead of the output.

    Rounding works on each number by itself, so the codes are the same. Convolutions then have a
    Quantize right behind them, which every runtime fuses, and the concatenation copies bytes.

    Args:
        graph: not changed.
    """
    producers = {node.output: node for node in graph.nodes}
    readers = Counter([*(name for node in graph.nodes for name in node.inputs), graph.output])
    values = dict(graph.values)
    nodes: list[g.Node] = []
    for node in graph.nodes:
        joined = producers.get(node.inputs[0]) if isinstance(node, g.Quantize) else None
        if not isinstance(node, g.Quantize) or not _moves_behind(joined, readers, graph):
            nodes.append(node)
            continue
        assert isinstance(joined, g.Concat)
        nodes.remove(joined)
        parts = []
        for number, name in enumerate(joined.inputs):
            part = f"{node.output}/{number}"
            values[part] = g.Value(part, values[name].shape, values[node.output].grid)
            parts.append(replace(node, name=part, inputs=(name,), output=part))
        together = tuple(part.output for part in parts)
        nodes += [*parts, replace(joined, inputs=together, output=node.output)]
    return replace(graph, nodes=tuple(nodes), values=values)


def _moves_behind(node: g.Node | None, readers: Counter[str], graph: g.IntegerGraph) -> bool:
    return (
        isinstance(node, g.Concat)
        and readers[node.output] == 1
        and all(graph.values[name].grid is None for name in node.inputs)
    )

"""A pass: concatenations that are rounded behind them, as concatenations of codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sqakd_deploy import graph as g


def with_codes_joined(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Round each input of a concatenation on the grid of its output, instead of the output.

    Rounding, and an activation before it, work on each number by itself: the codes are the same.
    Convolutions then have their Quantize right behind them, which every runtime fuses, and the
    concatenation copies bytes.

    Args:
        graph: not changed.
    """
    producers = {node.output: node for node in graph.nodes}
    readers = graph.readers()
    values = dict(graph.values)
    nodes: list[g.Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if not isinstance(node, g.Quantize):
            continue
        chain = [node, *_behind(node, producers, readers, graph)]
        joined = chain.pop()
        if not isinstance(joined, g.Concat):
            continue
        del nodes[-1]
        nodes = [kept for kept in nodes if kept not in (joined, *chain)]
        parts = []
        for number, part in enumerate(joined.inputs):
            copies = _copied(chain[::-1], part, number, values)
            parts.append(copies[-1].output)
            nodes += copies
        nodes.append(replace(joined, inputs=tuple(parts), output=node.output))
    return replace(graph, nodes=tuple(nodes), values=values)


def _behind(
    node: g.Node, producers: Mapping[str, g.Node], readers: Counter[str], graph: g.IntegerGraph
) -> list[g.Node]:
    """Activations before a rounding, and the concatenation of reals that they end at, if any."""
    found: list[g.Node] = []
    (name,) = node.inputs
    while readers[name] == 1 and isinstance(before := producers.get(name), (g.Clip, g.Concat)):
        found.append(before)
        if isinstance(before, g.Concat):
            return [] if any(graph.values[part].grid for part in before.inputs) else found
        (name,) = before.inputs
    return []


def _copied(
    chain: Sequence[g.Node], name: str, number: int, values: dict[str, g.Value]
) -> list[g.Node]:
    """A chain on one part of what it was on."""
    copies: list[g.Node] = []
    for node in chain:
        output = f"{node.output}/{number}"
        values[output] = replace(values[node.output], name=output, shape=values[name].shape)
        copies.append(replace(node, name=f"{node.name}/{number}", inputs=(name,), output=output))
        name = output
    return copies

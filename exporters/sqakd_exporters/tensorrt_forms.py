"""A pass: bounds of codes as bounds of the reals before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError

_LOWEST, _HIGHEST = -128, 127

_KEEP_SIGN = (
    g.Add,
    g.Mul,
    g.Concat,
    g.AveragePool,
    g.GlobalAveragePool,
    *g.DATA_MOVEMENT,
)
_POSITIVE = ("sigmoid", "hard_sigmoid")


def with_bounds_before(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Bound what is rounded, where int8 itself does not (rule T7).

    TensorRT has no codes below 8 bits for activations, and no operator between a quantizer's two
    halves. A Clip of reals whose bounds are whole steps cuts the same, and is part of the
    convolution before it, as a ReLU is. The lowest code of what is never negative needs no bound.

    Args:
        graph: not changed; every grid has zero-point 0 and fits int8.

    Raises:
        ExportError: if a grid does not, naming its quantizer.
    """
    readers = Counter([*(name for node in graph.nodes for name in node.inputs), graph.output])
    producers = {node.output: node for node in graph.nodes}
    values = dict(graph.values)
    nodes: list[g.Node] = []
    places: dict[str, int] = {}  # of the node that writes each value
    for node in graph.nodes:
        grid = graph.values[node.output].grid
        if isinstance(node, g.Quantize) and grid is not None:
            _check(node, grid)
            (name,) = node.inputs
            bounds = _bounds(node, grid, graph, producers)
            before = nodes[places[name]] if name in places else None
            if bounds and isinstance(before, g.Clip) and readers[name] == 1:
                nodes[places[name]] = _narrowed(before, *bounds)
            elif bounds:
                output = f"{node.output}/bounded"
                values[output] = g.Value(output, values[name].shape)
                nodes.append(g.Clip(f"{node.name}/bounds", (name,), output, *bounds))
                node = replace(node, inputs=(output,))
        places[node.output] = len(nodes)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), values=values)


def _check(node: g.Quantize, grid: g.Grid) -> None:
    if grid.zero_point != 0 or not _LOWEST <= grid.qmin <= 0 < grid.qmax <= _HIGHEST:
        raise ExportError(
            f"node {node.name!r}: wanted codes of int8 around zero-point 0 (rules T1 and T2), got "
            f"{grid.qmin} to {grid.qmax} around {grid.zero_point}; train for the target 'tensorrt'"
        )


def _bounds(
    node: g.Quantize, grid: g.Grid, graph: g.IntegerGraph, producers: Mapping[str, g.Node]
) -> tuple[float, float | None] | None:
    """What the reals need, or None where int8 saturates at the same codes.

    A value on a grid always has bounds, though they may cut nothing: ONNX Runtime, which shows that
    the file is its student, merges two pairs in a row into one of its own making.
    """
    if graph.values[node.inputs[0]].grid is not None:
        return _real(node, grid.qmin), _real(node, grid.qmax)
    below = grid.qmin > _LOWEST
    if grid.qmin == 0 and _never_negative(node.inputs[0], graph, producers):
        below = False
    if not below and grid.qmax == _HIGHEST:
        return None
    return _real(node, grid.qmin), None if grid.qmax == _HIGHEST else _real(node, grid.qmax)


def _real(node: g.Quantize, code: int) -> float:
    return float(node.step * np.float32(code))


def _never_negative(name: str, graph: g.IntegerGraph, producers: Mapping[str, g.Node]) -> bool:
    grid, node = graph.values[name].grid, producers.get(name)
    if grid is not None:
        return grid.qmin >= grid.zero_point
    if node is None:
        return False
    if isinstance(node, g.Clip):
        return node.low >= 0
    if isinstance(node, g.Activation):
        return node.function in _POSITIVE
    if isinstance(node, _KEEP_SIGN):
        return all(_never_negative(source, graph, producers) for source in node.inputs)
    return isinstance(node, g.Softmax)


def _narrowed(clip: g.Clip, low: float, high: float | None) -> g.Clip:
    if high is None or clip.high is None:
        high = clip.high if high is None else high
    else:
        high = min(clip.high, high)
    return replace(clip, low=max(clip.low, low), high=high)

"""A pass: bounds of codes as bounds of the reals before them."""

from __future__ import annotations

from collections.abc import Mapping

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError
from sqakd_exporters.bounding import bounding, real_of, with_reals_bounded

_LOWEST, _HIGHEST = -128, 127

_KEEP_SIGN = (
    g.Add,
    g.Mul,
    g.Concat,
    g.Divide,
    g.Resize,
    g.AveragePool,
    g.GlobalAveragePool,
    *g.DATA_MOVEMENT,
)
_POSITIVE = ("sigmoid", "hard_sigmoid")


def with_bounds_before(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Bound what is rounded, where int8 itself does not (rule T7).

    TensorRT has no codes below 8 bits for activations, and no operator between a quantizer's two
    halves; a Clip of reals cuts the same. The lowest code of what is never negative needs no bound.

    Args:
        graph: not changed; every grid has zero-point 0 and fits int8.

    Raises:
        ExportError: if a grid does not, naming its quantizer.
    """
    producers = {node.output: node for node in graph.nodes}

    def clip(node: g.Quantize, grid: g.Grid) -> g.Clip | None:
        _check(node, grid)
        bounds = _bounds(node, grid, graph, producers)
        return None if bounds is None else bounding(node, f"{node.name}/bounds", *bounds)

    return with_reals_bounded(graph, clip)


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
        return real_of(node, grid.qmin), real_of(node, grid.qmax)
    below = grid.qmin > _LOWEST
    if grid.qmin == 0 and _never_negative(node.inputs[0], graph, producers):
        below = False
    if not below and grid.qmax == _HIGHEST:
        return None
    return real_of(node, grid.qmin), None if grid.qmax == _HIGHEST else real_of(node, grid.qmax)


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
    if isinstance(node, g.Reduce) and node.function in ("length", "squares"):
        return True
    if isinstance(node, (*_KEEP_SIGN, g.Reduce)):
        return all(_never_negative(source, graph, producers) for source in node.inputs)
    return isinstance(node, g.Softmax) and not node.log

"""Where an integer graph is bounded, for OpenVINO: reals inside convolutions, codes elsewhere.

OpenVINO computes a float Clip inside the convolution before it, as it does a ReLU, but runs a Clip
of codes on its own (rule O10). Where it reads codes, though, or an average of them, it moves the
float Clip in front of their dequantisation: bounds lose up to a step of that grid, averages may be
rounded on it, and behind a constant term it bounds other numbers (rule O15). There codes are
bounded behind the rounding instead, which cuts the same, since rounding keeps order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sqakd_deploy import graph as g
from sqakd_exporters.bounding import bounding, real_of, with_reals_bounded
from sqakd_exporters.qdq import clip
from sqakd_exporters.writer import Writer


def with_bounds_apart(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Bound the reals before they are rounded, and codes behind it where reals would be changed.

    Args:
        graph: not changed; its grids are unsigned.
    """
    graph = _with_clips_behind(graph)
    kept = _bounded_as_codes(graph)
    values = {
        name: value if name in kept else replace(value, grid=value.grid and _widened(value.grid))
        for name, value in graph.values.items()
    }

    def clip_for(node: g.Quantize, grid: g.Grid) -> g.Clip | None:
        if grid.fills_dtype or node.output in kept:
            return None
        low, high = (real_of(node, code - grid.zero_point) for code in (grid.qmin, grid.qmax))
        return bounding(node, f"{node.output}/bounded", low, high)

    bounded = with_reals_bounded(graph, clip_for)
    return replace(bounded, values={**bounded.values, **values})


def clip_of_reals_or_codes(writer: Writer, node: g.Clip) -> None:
    """Clip, of the codes where its output is on a grid."""
    grid = writer.graph.values[node.output].grid
    if grid is None:
        clip(writer, node)
        return
    bounds = [
        writer.constant(f"{node.name}/{side}", np.array(_code(real, grid.scale, grid), grid.dtype))
        for side, real in (("low", node.low), ("high", node.high))
        if real is not None
    ]
    codes = writer.op("Clip", [writer.held(node), *bounds], node.output, node.name)
    writer.hold(node, codes, grid)


def _with_clips_behind(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Move activations behind the rounding that alone reads them, where bounds would lose."""
    losses = _losses(graph)
    readers = graph.readers()
    clips = {
        node.output: node
        for node in graph.nodes
        if isinstance(node, g.Clip) and readers[node.output] == 1 and _loses(node, losses)
    }
    values = dict(graph.values)
    nodes: list[g.Node] = []
    for node in graph.nodes:
        clip = clips.get(node.inputs[0]) if isinstance(node, g.Quantize) else None
        grid = values[node.output].grid
        if isinstance(node, g.Quantize) and clip is not None and grid is not None:
            unbounded = f"{node.output}/unbounded"
            values[unbounded] = replace(values[node.output], name=unbounded, grid=_widened(grid))
            nodes.remove(clip)
            nodes.append(replace(node, inputs=clip.inputs, output=unbounded))
            node = _on_codes(clip, node, grid, unbounded)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), values=values)


def _on_codes(clip: g.Clip, node: g.Quantize, grid: g.Grid, unbounded: str) -> g.Clip:
    """What bounds the codes as the Clip and the grid together do."""
    low = max(_code(clip.low, node.step, grid), grid.qmin)
    high = grid.qmax if clip.high is None else min(_code(clip.high, node.step, grid), grid.qmax)
    below, above = (float(grid.scale * np.float32(end - grid.zero_point)) for end in (low, high))
    return g.Clip(clip.name, (unbounded,), node.output, below, None if high == 255 else above)


def _code(real: float, step: np.float32, grid: g.Grid) -> int:
    code = np.rint(np.float32(real) / step) + grid.zero_point
    return int(min(max(code, 0), 255))


def _losses(graph: g.IntegerGraph) -> dict[str, float]:
    """By how much OpenVINO may move the bounds of what it computes on codes, by value."""
    grids = {name: value.grid for name, value in graph.values.items()}
    found = {name: float(grid.scale) for name, grid in grids.items() if grid is not None}
    for node in graph.nodes:
        loss = found.get(node.inputs[0]) if node.inputs else None  # a constant has none
        if loss is None or node.output in found:
            continue
        read = {grids[name] for name in node.inputs}
        off_zero = any(grid is None or grid.zero_point for grid in read)
        if isinstance(node, (g.Clip, *g.DATA_MOVEMENT)):
            found[node.output] = loss
        elif isinstance(node, (g.Shift, g.ChannelAffine)):  # bounds do not follow the term
            found[node.output] = np.inf
        elif isinstance(node, g.Scale):
            found[node.output] = loss * float(np.abs(node.constant).max())
        elif isinstance(node, g.AveragePool) and not node.ceil_mode:  # that is in float (rule O4)
            found[node.output] = np.inf if off_zero else loss  # 0 is left alone, others rounded
        elif isinstance(node, g.Concat) and (len(read) == 1 or not off_zero):
            found[node.output] = loss if len(read) == 1 else np.inf  # bounds by the first scale
    return found


def _loses(node: g.Clip, losses: Mapping[str, float]) -> bool:
    """Whether bounds of an activation may move: that of a ReLU is a code."""
    loss = losses.get(node.inputs[0], 0.0)
    return loss == np.inf or (loss > 0 and (node.low, node.high) != (0.0, None))


def _bounded_as_codes(graph: g.IntegerGraph) -> set[str]:
    """Values whose bounds would show if reals were bounded, and what shares a grid."""
    losses = _losses(graph)
    kept = {
        node.output
        for node in graph.nodes
        if isinstance(node, g.Quantize) and losses.get(node.inputs[0], 0.0) > float(node.step) / 2
    }
    grids = {name: value.grid for name, value in graph.values.items()}
    sharing = [
        {node.output, *node.inputs}
        for node in graph.nodes
        if isinstance(node, (g.Concat, *g.DATA_MOVEMENT)) and grids[node.output]
    ]
    while found := [names for names in sharing if kept & names and not names <= kept]:
        kept.update(*found)
    return kept


def _widened(grid: g.Grid) -> g.Grid:
    return replace(grid, qmin=0, qmax=255)

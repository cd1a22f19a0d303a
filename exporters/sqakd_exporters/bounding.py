"""A pass: bounds of codes as bounds of the reals before they are rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from sqakd_deploy import graph as g

ClipFor: TypeAlias = Callable[[g.Quantize, g.Grid], g.Clip | None]
"""The Clip that a quantizer to a grid needs in front of it, or None where it needs none."""


def with_reals_bounded(graph: g.IntegerGraph, clip_for: ClipFor) -> g.IntegerGraph:
    """Put Clips in front of quantizers; one that is there already is narrowed instead.

    A Clip whose bounds are a whole number of steps cuts what a Clip of codes does: rounding keeps
    order. It is part of the convolution before it, as a ReLU is.

    Args:
        graph: not changed.
        clip_for: says what is bounded, and how.
    """
    readers = graph.readers()
    values = dict(graph.values)
    nodes: list[g.Node] = []
    places: dict[str, int] = {}  # of the node that writes each value
    for node in graph.nodes:
        grid = graph.values[node.output].grid
        clip = clip_for(node, grid) if isinstance(node, g.Quantize) and grid is not None else None
        if clip is not None:
            (name,) = node.inputs
            before = nodes[places[name]] if name in places else None
            if isinstance(before, g.Clip) and readers[name] == 1:
                nodes[places[name]] = _narrowed(before, clip)
            else:
                values[clip.output] = g.Value(clip.output, values[name].shape)
                nodes.append(clip)
                node = replace(node, inputs=(clip.output,))
        places[node.output] = len(nodes)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), values=values)


def bounding(node: g.Quantize, name: str, low: float, high: float | None) -> g.Clip:
    """A Clip of what a quantizer rounds.

    Args:
        node: the quantizer.
        name: of the Clip.
        low: lower bound.
        high: upper bound, None for no bound.
    """
    return g.Clip(name, node.inputs, f"{node.output}/bounded", low, high)


def real_of(node: g.Quantize, level: int) -> float:
    """What a quantizer rounds to a level, a code less the zero-point."""
    return float(node.step * np.float32(level))


def _narrowed(clip: g.Clip, other: g.Clip) -> g.Clip:
    highs = [high for high in (clip.high, other.high) if high is not None]
    return replace(clip, low=max(clip.low, other.low), high=min(highs, default=None))

"""What weights and biases take, in a file and by their bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sqakd_deploy.graph import IntBias, IntegerGraph, IntWeight


@dataclass(frozen=True)
class Sizes:
    """What a student's numbers take.

    Attributes:
        float_size: in float32 (bytes).
        information_size: weights at their own bits, all else at 32 (bytes).
        narrow_layers: count of layers with weights below 8 bits.
    """

    float_size: int
    information_size: int
    narrow_layers: int


def sizes_of(graph: IntegerGraph) -> Sizes:
    """All sizes of a graph."""
    narrow = sum(bits < 8 for _, bits in _weights(graph))
    return Sizes(float_size(graph), information_size(graph), narrow)


def float_size(graph: IntegerGraph) -> int:
    """Bytes of all parameters in float32, BatchNorm folded."""
    weights = sum(4 * count for count, _ in _weights(graph))
    return weights + 4 * _biases(graph) + _float_parameters(graph)


def expected_size(graph: IntegerGraph) -> int:
    """Bytes of weights (one each, four if float) in an exported file, and what is beside them."""
    stored = sum(count * (4 if bits == 32 else 1) for count, bits in _weights(graph))
    return stored + _beside(graph)


def information_size(graph: IntegerGraph) -> int:
    """Bytes of the weights at their own bits; biases, scales and float parameters have 32."""
    return sum(count * bits for count, bits in _weights(graph)) // 8 + _beside(graph)


def _beside(graph: IntegerGraph) -> int:
    return 4 * (_biases(graph) + _scales(graph)) + _float_parameters(graph)


def _weights(graph: IntegerGraph) -> list[tuple[int, int]]:
    """(weights, bits each) of every layer with integer weights or float ones."""
    return [
        (w.codes.size, w.bits) if isinstance(w, IntWeight) else (w.size, 32)
        for w in _all(graph, "weight")
    ]


def _biases(graph: IntegerGraph) -> int:
    return sum(len(b.codes if isinstance(b, IntBias) else b) for b in _all(graph, "bias"))


def _scales(graph: IntegerGraph) -> int:
    """Scales that differ: a layer that no BatchNorm scaled channel by channel has one."""
    weights = _all(graph, "weight")
    return sum(len(np.unique(w.scale)) for w in weights if isinstance(w, IntWeight))


def _float_parameters(graph: IntegerGraph) -> int:
    """Bytes of what no layer with weights has: a LayerNorm's gains, positions."""
    nodes = [node for node in graph.nodes if not hasattr(node, "weight")]
    return sum(v.nbytes for node in nodes for v in vars(node).values() if isinstance(v, np.ndarray))


def _all(graph: IntegerGraph, field: str) -> list[Any]:
    found = (getattr(node, field, None) for node in graph.nodes)
    return [value for value in found if value is not None]

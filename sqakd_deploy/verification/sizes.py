"""What weights and biases take, in a file and by their bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sqakd_deploy.graph import Conv, IntBias, IntegerGraph, IntWeight, Linear


@dataclass(frozen=True)
class Sizes:
    """What a student's numbers take.

    Attributes:
        float_size: in float32 (bytes).
        information_size: weights at their own bits, all else at 32 (bytes).
        narrow_layers: count of layers with weights below 8 bits.
        byte_layers: of those with 8; None in what an older version saved.
        float_layers: of those with float weights; None there, too.
    """

    float_size: int
    information_size: int
    narrow_layers: int
    byte_layers: int | None = None
    float_layers: int | None = None


def sizes_of(graph: IntegerGraph) -> Sizes:
    """All sizes of a graph."""
    layers = [node for node in graph.nodes if isinstance(node, (Conv, Linear))]
    bits = [_weights(layer)[1] for layer in layers]
    narrow, whole = sum(b < 8 for b in bits), bits.count(8)
    sizes = float_size(graph), information_size(graph)
    return Sizes(*sizes, narrow, whole, len(layers) - narrow - whole)


def float_size(graph: IntegerGraph) -> int:
    """Bytes of all parameters in float32, BatchNorm folded."""
    layers = _layers(graph)
    weights = sum(4 * count for count, _ in map(_weights, layers))
    return weights + 4 * sum(map(_biases, layers)) + _float_parameters(graph)


def expected_size(graph: IntegerGraph) -> int:
    """Bytes of weights (one each, four if float) in an exported file, and what is beside them."""
    weights = map(_weights, _layers(graph))
    return sum(count * (4 if bits == 32 else 1) for count, bits in weights) + _beside(graph)


def information_size(graph: IntegerGraph) -> int:
    """Bytes of the weights at their own bits; biases, scales and float parameters have 32."""
    weights = map(_weights, _layers(graph))
    return sum(count * bits for count, bits in weights) // 8 + _beside(graph)


def _beside(graph: IntegerGraph) -> int:
    numbers = sum(_biases(layer) + _scales(layer) for layer in _layers(graph))
    return 4 * numbers + _float_parameters(graph)


def _layers(graph: IntegerGraph) -> list[Conv | Linear]:
    """Layers with weights; one that is called several times counts once.

    Codes alone do not tell layers apart: those of a BatchNorm on its own are all the same, as those
    of another.
    """
    found: dict[object, Conv | Linear] = {}
    for node in graph.nodes:
        if isinstance(node, (Conv, Linear)):
            held = node.weight
            numbers = (held.codes, held.scale) if isinstance(held, IntWeight) else (held,)
            found.setdefault(tuple((part.shape, part.tobytes()) for part in numbers), node)
    return list(found.values())


def _weights(layer: Conv | Linear) -> tuple[int, int]:
    """Count, and bits each."""
    weight = layer.weight
    return (weight.codes.size, weight.bits) if isinstance(weight, IntWeight) else (weight.size, 32)


def _biases(layer: Conv | Linear) -> int:
    bias = layer.bias
    return 0 if bias is None else len(bias.codes if isinstance(bias, IntBias) else bias)


def _scales(layer: Conv | Linear) -> int:
    """Scales that differ: a layer that no BatchNorm scaled channel by channel has one."""
    weight = layer.weight
    return len(np.unique(weight.scale)) if isinstance(weight, IntWeight) else 0


def _float_parameters(graph: IntegerGraph) -> int:
    """Bytes of what no layer with weights has: a LayerNorm's gains, positions."""
    nodes = [node for node in graph.nodes if not isinstance(node, (Conv, Linear))]
    return sum(v.nbytes for node in nodes for v in vars(node).values() if isinstance(v, np.ndarray))

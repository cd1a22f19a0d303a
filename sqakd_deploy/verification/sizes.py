"""What weights and biases take, in a file and by their bits."""

from __future__ import annotations

from dataclasses import dataclass

from sqakd_deploy.graph import IntegerGraph, IntWeight


@dataclass(frozen=True)
class Sizes:
    """What a student's numbers take.

    Attributes:
        float_size: in float32 (bytes).
        information_size: weights at their own bits, scales and biases (bytes).
        narrow_layers: count of layers with weights below 8 bits.
    """

    float_size: int
    information_size: int
    narrow_layers: int


def sizes_of(graph: IntegerGraph) -> Sizes:
    """All sizes of a graph."""
    narrow = sum(bits < 8 for _, bits, _ in _weights(graph))
    return Sizes(float_size(graph), information_size(graph), narrow)


def _weights(graph: IntegerGraph) -> list[tuple[int, int, int]]:
    """(weights, bits each, output channels) of every layer with integer weights or float ones."""
    found = []
    for node in graph.nodes:
        weight = getattr(node, "weight", None)
        if isinstance(weight, IntWeight):
            found.append((weight.codes.size, weight.bits, weight.codes.shape[0]))
        elif weight is not None:
            found.append((weight.size, 32, weight.shape[0]))
    return found


def float_size(graph: IntegerGraph) -> int:
    """Bytes of the same weights and biases in float32, BatchNorm folded."""
    return sum(4 * (count + channels) for count, _, channels in _weights(graph))


def expected_size(graph: IntegerGraph) -> int:
    """Bytes of weights (one each, four if float), scales and biases in an exported file."""
    stored = sum(count * (4 if bits == 32 else 1) for count, bits, _ in _weights(graph))
    return stored + sum(8 * channels for *_, channels in _weights(graph))


def information_size(graph: IntegerGraph) -> int:
    """Bytes of the weights at their own bits, scales and biases beside them."""
    packed = sum(count * bits for count, bits, _ in _weights(graph)) // 8
    return packed + sum(8 * channels for *_, channels in _weights(graph))

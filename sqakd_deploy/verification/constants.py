"""The numbers of every layer: what a student's integers say, and where a file says otherwise.

Comparing them finds a fault whether or not it shows in any answer: a wrong weight behind a dead
channel, a bound that no image reaches. Zero-points, codes and bounds are counted from the lowest
code of their 8-bit type, so that an int8 grid and its uint8 form are the same.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy import graph as ir
from sqakd_deploy.verification.settings import AXIS, settings_of

Facts: TypeAlias = Mapping[str, NDArray[Any]]
"""What a layer's constants hold, by what they are called here."""

Constants: TypeAlias = Mapping[str, Facts]
"""Facts by the layer's name, in topological order."""

WEIGHT_CODES, WEIGHT_SCALE, WEIGHT_ZERO = "weight codes", "weight scale", "weight zero-point"
WEIGHT_SIGN, WEIGHT, WEIGHT_BITS = "weight sign", "weight", "weight bits"
WEIGHT_AXIS = "weight scale on another axis than that of the output channels"
BIAS_CODES, BIAS_SCALE, BIAS = "bias codes", "bias scale", "bias"
STEP, ZERO_POINT, LOWEST, HIGHEST = "step", "zero-point", "lowest code", "highest code"
SCALE, READER_ZERO = "scale", "zero-point that readers subtract"
LOWER, UPPER, SHIFT, CONSTANT = "lower bound", "upper bound", "shift", "constant"

_NEGATIVE = {"int8": -128, "uint8": 0}


def offset(dtype: str) -> int:
    """The lowest code of an 8-bit type."""
    return _NEGATIVE[dtype]


@dataclass(frozen=True)
class Difference:
    """A constant of a file that is not its student's.

    Attributes:
        layer: its layer.
        constant: what it is, for instance ``"bias codes"``.
        count: numbers that differ.
        of: numbers there are.
        detail: which, and by what.
    """

    layer: str
    constant: str
    count: int
    of: int
    detail: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.constant}: {self.detail}"


def constants_of(graph: ir.IntegerGraph) -> dict[str, Facts]:
    """What a file of a graph should hold, by layer."""
    found = {node.name: dict(_facts(graph, node)) for node in graph.nodes}
    for name, what, value in (setting for node in graph.nodes for setting in settings_of(node)):
        found.setdefault(name, {})[what] = value
    return {name: facts for name, facts in found.items() if facts}


def _facts(graph: ir.IntegerGraph, node: ir.Node) -> Iterator[tuple[str, NDArray[Any]]]:
    grid = graph.values[node.output].grid
    if isinstance(node, ir.Quantize) and grid is not None:
        yield from quantizer_facts(node.step, grid).items()
    elif isinstance(node, ir.Clip):
        if node.low > -np.inf:
            yield LOWER, np.array(node.low, np.float32)
        if node.high is not None:
            yield UPPER, np.array(node.high, np.float32)
    elif isinstance(node, (ir.ChannelAffine, ir.LayerNorm)):
        yield SCALE, node.scale
        yield SHIFT, node.shift
    elif isinstance(node, ir.Softmax):
        yield AXIS, np.array(from_behind(node.axis, len(graph.values[node.output].shape)))
    elif isinstance(node, ir.Resize):
        yield SCALE, np.array([1.0, 1.0, *node.scale], np.float32)
    elif isinstance(node, ir.WithConstant):
        yield CONSTANT, node.constant
    else:
        yield from _layer_facts(getattr(node, "weight", None), getattr(node, "bias", None))


def from_behind(axis: int, rank: int) -> int:
    """An axis as counted from the last, which is -1."""
    return axis if axis < 0 else axis - rank


def quantizer_facts(step: np.float32, grid: ir.Grid) -> dict[str, NDArray[Any]]:
    """What a quantizer's nodes in a file should hold."""
    low = offset(grid.dtype)
    return {
        STEP: np.array(step, np.float32),
        ZERO_POINT: np.array(grid.zero_point - low),
        LOWEST: np.array(grid.qmin - low),
        HIGHEST: np.array(grid.qmax - low),
        SCALE: np.array([grid.scale], np.float32),
        READER_ZERO: np.array([grid.zero_point - low]),
    }


def _layer_facts(
    weight: ir.Weight | None, bias: ir.Bias | None
) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(weight, ir.IntWeight):
        yield WEIGHT_CODES, weight.codes
        yield WEIGHT_SCALE, weight.scale
        yield WEIGHT_ZERO, np.zeros(1, np.int64)
        yield WEIGHT_BITS, np.array(stated_bits(weight))
    elif weight is not None:
        yield WEIGHT, weight
    if isinstance(bias, ir.IntBias):
        yield BIAS_CODES, bias.codes
        yield BIAS_SCALE, bias.scale
    elif bias is not None:
        yield BIAS, bias


def stated_bits(weight: ir.IntWeight) -> int:
    """Bits that a format states which knows two's complement with zero-point 0, and -1 and 1.

    They hold the grid; of one without zero, whose codes are odd, the codes that there are.
    """
    lowest, highest = int(weight.codes.min()), int(weight.codes.max())
    if set(np.unique(weight.codes)) <= {-1, 1}:
        return 1
    held = max((-min(lowest, -1) - 1).bit_length(), max(highest, 0).bit_length()) + 1
    return held if weight.mid_rise else max(held, weight.bits)


# -- comparing ---------------------------------------------------------------------------------


def compare_constants(
    expected: Constants, found: Constants, unsupported: Mapping[str, str] = MappingProxyType({})
) -> list[Difference]:
    """Every constant of a file that is not what it should be, in topological order.

    Args:
        expected: of the student.
        found: of the file; a layer that it lacks is a difference, too. A quantizer behind a
            concatenation may be there once for each part of it, as ``quantizer/0`` and so on.
        unsupported: why the file's layer cannot be compared, by its name.
    """
    differences: list[Difference] = []
    for layer, facts in expected.items():
        places = [layer] if layer in found else parts_of(layer, found)
        if not places:
            why = unsupported.get(layer, "no node of the file has its name")
            differences.append(Difference(layer, "layer", 1, 1, why))
        for place in places:
            for name in [*facts, *(extra for extra in found[place] if extra not in facts)]:
                differences += _compare(place, name, facts.get(name), found[place].get(name))
    return differences


def parts_of(layer: str, names: Container[str]) -> list[str]:
    """What a layer is called that is there once for each part of a concatenation."""
    return list(takewhile(lambda part: part in names, (f"{layer}/{i}" for i in count())))


def _compare(
    layer: str, name: str, wanted: NDArray[Any] | None, got: NDArray[Any] | None
) -> list[Difference]:
    if wanted is None or got is None:
        if name in (WEIGHT_BITS, AXIS):  # which not every form states
            return []
        side = "the file has none" if got is None else "the student has none"
        return [Difference(layer, name, 1, 1, side)]
    if wanted.shape != got.shape:
        detail = f"wanted shape {wanted.shape}, the file has {got.shape}"
        return [Difference(layer, name, got.size, max(wanted.size, 1), detail)]
    differs = np.atleast_1d(wanted != got)
    if not differs.any():
        return []
    found = []
    if name == WEIGHT_CODES:
        turned = _turned(wanted, got)
        if turned.any():
            found.append(_turned_difference(layer, turned))
            differs[turned] = False
    if differs.any():
        found.append(_difference(layer, name, differs, np.atleast_1d(wanted), np.atleast_1d(got)))
    return found


def _turned(wanted: NDArray[Any], got: NDArray[Any]) -> NDArray[np.bool_]:
    """Channels ``(O,)`` whose codes all have the opposite sign, as if a fold had been left out."""
    axes = tuple(range(1, wanted.ndim))
    opposite = np.all(wanted.astype(np.int64) == -got.astype(np.int64), axis=axes)
    changed: NDArray[np.bool_] = opposite & np.any(wanted != got, axis=axes)
    return changed


def _turned_difference(layer: str, turned: NDArray[np.bool_]) -> Difference:
    channels = ", ".join(map(str, np.flatnonzero(turned)[:8])) + (", …" if turned.sum() > 8 else "")
    detail = (
        f"all codes of channel {channels} have the opposite sign: that of BatchNorm's factor is "
        "not folded in, or twice"
    )
    return Difference(layer, WEIGHT_SIGN, int(turned.sum()), len(turned), detail)


def _difference(
    layer: str, name: str, differs: NDArray[np.bool_], wanted: NDArray[Any], got: NDArray[Any]
) -> Difference:
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    values = f"{_number(got[first])} in the file, {_number(wanted[first])} in the student"
    wrong, total = int(differs.sum()), differs.size
    if total == 1:
        return Difference(layer, name, wrong, total, values)
    place = first[0] if len(first) == 1 else first
    detail = f"{wrong} of {total} differ, the first at {place}: {values}"
    return Difference(layer, name, wrong, total, detail)


def _number(value: Any) -> str:
    return f"{value:.9g}" if np.issubdtype(type(value), np.floating) else str(int(value))

"""Scales that keep codes off the borders between levels.

A residual sum of two tensors of 8 bits has 65,536 pairs of codes, and some come to lie within
float32's rounding of the border between two levels of the quantizer behind it. On which side they
fall depends on the order of a few multiplications and additions, which runtimes choose differently;
and a pair that is met in every image makes every image differ (``docs/decisions.md``). Products of
two codes, means of many and interpolated ones are alike. What a quantizer can meet there is known
before any image is seen, and its step can be moved by a few millionths, which no accuracy notices
and training would not settle, until nothing lies there. All runtimes and PyTorch then round the
same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sqakd_deploy import graph as ir
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.lowering.lowerable import without_form
from sqakd_deploy.quantizers import ActivationQuantizer

_Floats = NDArray[np.float64]

_UNIT = 2.0**-21  # of a step: moves what lies at 255 steps by about what float32 rounds there
_TRIES = 1024  # a step moves by 1/4,000 at most
_HALF_ULP = 2.0**-24
_WIDEST = 255  # the largest zero-point, or code, that a kernel adds on the way
_CUT = 16  # positions of a window: more have too many sizes at the edge for one step to be free
_ROOM = 4.0  # for codes that are rounded anew: kernels count them from the top of the type as well


@dataclass(frozen=True)
class Met:
    """What a quantizer can meet.

    Attributes:
        values: real numbers ``(K,)``.
        rounded: sizes of what is rounded on the way to each, added up (reals). Partial sums with
            zero-points are not all counted: that all are off by half a unit at once is not met.
        room: how many times float32's rounding they are to be kept from a border.
    """

    values: _Floats
    rounded: _Floats
    room: float = 1.0

    def cut(self, low: float, high: float | None) -> Met:
        """What a Clip leaves of it, and its bounds, to which it takes the rest."""
        top = np.inf if high is None else high
        inside = (self.values >= low) & (self.values <= top)
        bounds = [bound for bound in (low, top) if np.isfinite(bound)]
        values = np.concatenate([self.values[inside], bounds])
        return Met(values, np.append(self.rounded[inside], np.zeros(len(bounds))), self.room)

    def margin(self, step: float, low: int, high: int) -> float:
        """The least distance from a border of two levels, as a multiple of what is wanted.

        Args:
            step: of the quantizer.
            low: its lowest level.
            high: its highest level; beyond either, all is cut to it.
        """
        positions = self.values / step
        inside = (positions > low - 1) & (positions < high + 1)
        positions, rounded = positions[inside], self.rounded[inside] / step
        nearest = np.floor(positions) + 0.5
        between = (nearest > low) & (nearest < high)
        rounding = _HALF_ULP * (rounded + np.abs(positions) + _WIDEST)
        margins = np.abs(positions - nearest) / (self.room * rounding)
        return float(margins[between].min(initial=np.inf))


@dataclass(frozen=True)
class Mean:
    """What a quantizer can meet of a mean of codes: ``first … last``, times a step.

    There are millions of them in a large image, but few lie next to a border.

    Attributes:
        first: the least sum of levels.
        last: the greatest.
        unit: what one of the sum is worth (reals).
        rounded: as :class:`Met` has it, beside the value itself (reals).
    """

    first: int
    last: int
    unit: float
    rounded: float

    def cut(self, low: float, high: float | None) -> Mean:
        """What a Clip leaves of it."""
        first = max(self.first, math.ceil(low / self.unit)) if math.isfinite(low) else self.first
        last = self.last if high is None else min(self.last, math.floor(high / self.unit))
        return replace(self, first=first, last=max(first, last))

    def margin(self, step: float, low: int, high: int) -> float:
        """As :meth:`Met.margin`."""
        borders = (np.arange(low, high) + 0.5) * (step / self.unit)
        sums = np.concatenate([np.floor(borders), np.ceil(borders)])
        values = np.unique(sums.clip(self.first, self.last)) * self.unit
        return Met(values, 2 * np.abs(values) + self.rounded).margin(step, low, high)


@dataclass(frozen=True)
class Several:
    """What a quantizer can meet of tensors side by side."""

    parts: tuple[Met | Mean | Several, ...]

    def cut(self, low: float, high: float | None) -> Several:
        """What a Clip leaves of them."""
        return Several(tuple(part.cut(low, high) for part in self.parts))

    def margin(self, step: float, low: int, high: int) -> float:
        """As :meth:`Met.margin`."""
        return min((part.margin(step, low, high) for part in self.parts), default=math.inf)


@dataclass(frozen=True)
class _Levels:
    """Of a quantizer: ``low … high``, times a scale."""

    low: int
    high: int
    scale: float

    @property
    def met(self) -> Met:
        """Them all; a kernel multiplies codes, which count from the lowest, and the zero-point."""
        levels = np.arange(self.low, self.high + 1, dtype=np.float64)
        return Met(levels * self.scale, (np.abs(levels) + levels - 2 * self.low) * self.scale)

    def mean(self, count: int) -> Mean:
        """Of so many of them."""
        first, last = count * self.low, count * self.high
        return Mean(first, last, self.scale / count, -self.low * self.scale)


def settle(student: nn.Module) -> None:
    """Give a student numbers that its integers have as they are, and that all runtimes round alike.

    Steps first, since the accumulators that biases are rounded to depend on them: see
    :func:`off_borders` and :func:`~sqakd_deploy.lowering.integer.snap_biases`.

    Args:
        student: calibrated; changed in place. One without an integer form stays as it is.
    """
    off_borders(student)
    snap_biases(student)


@torch.no_grad()
def off_borders(student: nn.Module) -> tuple[str, ...]:
    """Move steps of activation quantizers until no code that they can meet lies on a border.

    Those behind sums and products of two quantised tensors, behind pools that average one and
    interpolation of one, and those that round one anew. Where none of the steps tried is free, the
    best is taken.

    Args:
        student: calibrated; changed in place. One without an integer form stays as it is.

    Returns:
        The quantizers that may still meet a code on a border.
    """
    if without_form(student) is not None:
        return ()
    walk = _Walk(student, lower(student))
    return tuple(
        node.name
        for node in walk.graph.nodes
        if isinstance(node, ir.Quantize)
        and (met := walk.met(node.inputs[0])) is not None
        and _moved(_quantizer(student, node), met) < 1.0
    )


def _moved(quantizer: ActivationQuantizer, met: Met | Mean | Several) -> float:
    """Take the nearest step that is free, or else the best; the margin that it has."""
    before = {name: tensor.clone() for name, tensor in quantizer.range_tensors().items()}
    zero, margins, units_of = quantizer.grid()[1], dict[float, float](), dict[float, int]()
    for units in _alternating(_TRIES if before else 0):
        _scale(quantizer, before, units)
        step, zero_point, _ = quantizer.grid()
        if zero_point != zero or step in margins:  # a limit can keep it where it is
            continue
        units_of[step] = units
        margins[step] = met.margin(step, -zero, quantizer.steps - zero)
        if margins[step] >= 1.0:
            return margins[step]
    best = max(margins, key=margins.__getitem__)
    _scale(quantizer, before, units_of[best])
    return margins[best]


def _alternating(count: int) -> Iterator[int]:
    """0, −1, 1, −2, 2 …"""
    yield 0
    for distance in range(1, count // 2 + 1):
        yield from (-distance, distance)


def _scale(quantizer: ActivationQuantizer, before: Mapping[str, Any], units: int) -> None:
    for name, tensor in quantizer.range_tensors().items():
        tensor.copy_(before[name] * (1.0 + units * _UNIT))


def _quantizer(student: nn.Module, node: ir.Quantize) -> ActivationQuantizer:
    modules = student.get_submodule(node.name).modules()
    return next(m for m in modules if isinstance(m, ActivationQuantizer))


def _parts(scale: float) -> int:
    """Into how many the way between two entries is divided by those of an enlarged axis; 0: many.

    Entry ``i`` lies at ``(i + 1/2)/scale − 1/2``.
    """
    return int(scale) * (1 if scale % 2 else 2) if scale.is_integer() else 0


class _Walk:
    """From a quantizer back to those before it, in topological order: these have moved already."""

    def __init__(self, student: nn.Module, graph: ir.IntegerGraph) -> None:
        self.student, self.graph = student, graph
        self.producers = {node.output: node for node in graph.nodes}

    def met(self, name: str) -> Met | Mean | Several | None:
        """All that a value can be; None where that is more than a few numbers."""
        node = self.producers.get(name)
        if isinstance(node, ir.Clip):
            met = self.met(node.inputs[0])
            return None if met is None else met.cut(node.low, node.high)
        if isinstance(node, (ir.Add, ir.Mul)):
            return self._pairs(node)
        if isinstance(node, ir.GlobalAveragePool):
            return self._mean(node, self.graph.values[node.inputs[0]].shape[2:])
        if isinstance(node, ir.AveragePool):
            return self._windows(node)
        if isinstance(node, ir.Resize):
            return self._between(node)
        if isinstance(node, ir.Concat):  # what is not known of it leaves the rest as it is
            parts = [self.met(source) for source in node.inputs]
            return Several(tuple(part for part in parts if part is not None))
        levels = self._levels(name)
        return None if levels is None else replace(levels.met, room=_ROOM)

    def _pairs(self, node: ir.Node) -> Met | None:
        first, second = (self._levels(source) for source in node.inputs)
        if first is None or second is None:
            return None
        one, other = first.met, second.met
        if isinstance(node, ir.Add):
            values = np.add.outer(one.values, other.values)
            return Met(values.ravel(), np.add.outer(one.rounded, other.rounded).ravel())
        values = np.multiply.outer(one.values, other.values).ravel()
        return Met(values, 4 * np.abs(values))  # zero-points are subtracted as integers

    def _mean(self, node: ir.Node, window: tuple[int | None, ...]) -> Mean | None:
        levels = self._levels(node.inputs[0])
        count = math.prod(extent or 0 for extent in window)
        return None if levels is None or not count else levels.mean(count)

    def _windows(self, node: ir.AveragePool) -> Mean | Several | None:
        """Of a window; of small ones that may be cut short, and divide by what is left, as well."""
        whole = self._mean(node, node.kernel)
        cut = node.ceil_mode or (any(node.padding) and not node.count_include_pad)
        if whole is None or not cut or math.prod(node.kernel) > _CUT:
            return whole
        sizes = product(*(range(1, size + 1) for size in node.kernel))
        means = {math.prod(size): self._mean(node, size) for size in sizes}
        return Several(tuple(mean for mean in means.values() if mean is not None))

    def _between(self, node: ir.Resize) -> Mean | None:
        """Of four neighbours, each counted in parts of the way to it."""
        parts = math.prod(_parts(float(scale)) for scale in node.scale)
        levels = None if node.align_corners or not parts else self._levels(node.inputs[0])
        return None if levels is None else levels.mean(parts)

    def _levels(self, name: str) -> _Levels | None:
        """The levels of codes, with the scale that they have now; None of floats."""
        node = self.producers.get(name)
        if self.graph.values[name].grid is None or node is None:
            return None
        if isinstance(node, ir.DATA_MOVEMENT):
            return self._levels(node.inputs[0])
        if not isinstance(node, ir.Quantize):
            return None
        quantizer = _quantizer(self.student, node)
        _, zero, scale = quantizer.grid()
        return _Levels(-zero, quantizer.steps - zero, scale)

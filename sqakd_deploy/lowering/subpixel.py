"""The plain convolution that computes what a transposed one does.

A transposed convolution of stride ``s`` is a convolution with ``s·s`` times as many output
channels, one for each place within a block of ``s × s`` pixels, whose channels are then laid out as
pixels (sub-pixel convolution; Shi et al., 2016). Runtimes have integer kernels for that, and the
layout only moves codes. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy import graph as ir

_LAYOUT = "/pixels"


@dataclass(frozen=True)
class Subpixel:
    """The convolution that stands for a transposed one.

    Attributes:
        weight: with ``s·s`` channels for each one of the layer's.
        bias: likewise.
        padding: ``(top, left, bottom, right)``.
        blocks: rows and columns of blocks that it gives.
        stride: of the transposed convolution: rows and columns of a block.
        starts: rows and columns to cut off at the top and left of the pixels.
    """

    weight: ir.Weight
    bias: ir.Bias | None
    padding: tuple[int, int, int, int]
    blocks: tuple[int, int]
    stride: tuple[int, int]
    starts: tuple[int, int]

    @property
    def channels(self) -> int:
        """Output channels of the convolution."""
        codes = self.weight.codes if isinstance(self.weight, ir.IntWeight) else self.weight
        return len(codes)


def subpixel(
    module: Any, weight: ir.Weight, bias: ir.Bias | None, size: ir.Shape, wanted: ir.Shape
) -> Subpixel:
    """Rewrite a transposed convolution.

    Along an axis, output ``t = s·m + r`` is ``Σ_j x[m − j] · w[r + s·j]``: a convolution over ``m``
    with the kernel of phase ``r``, turned round.

    Args:
        module: its stride, padding and dilation.
        weight: ``(O, I/g, kH, kW)``.
        bias: ``(O,)``.
        size: rows and columns of the input.
        wanted: rows and columns of the output.
    """
    axes = [
        _axis(kernel, *geometry)
        for kernel, *geometry in zip(
            module.kernel_size, module.stride, module.padding, module.dilation, size, wanted,
            strict=True,
        )
    ]  # fmt: skip
    rows, columns = axes
    pick = (rows.taps, columns.taps)
    count = len(rows.taps) * len(columns.taps)
    return Subpixel(
        _spread_weight(weight, pick),
        _spread_bias(bias, count),
        (rows.before, columns.before, rows.after, columns.after),
        (rows.blocks, columns.blocks),
        (len(rows.taps), len(columns.taps)),
        (rows.start, columns.start),
    )


@dataclass(frozen=True)
class _Axis:
    taps: NDArray[np.intp]  # (s, J): which tap of the kernel, by phase and position; −1 is none
    before: int
    after: int
    blocks: int
    start: int


def _axis(kernel: int, stride: int, padding: int, dilation: int, size: int, wanted: int) -> _Axis:
    reach = dilation * (kernel - 1) + 1
    width = -(-reach // stride)
    positions = np.arange(stride)[:, None] + stride * np.arange(width)[::-1]
    inside = (positions < reach) & (positions % dilation == 0)
    skipped = min(padding // stride, width - 1)  # whole blocks of padding need not be computed
    end = max(-(-(padding + wanted) // stride), size)
    return _Axis(
        np.where(inside, positions // dilation, -1),
        width - 1 - skipped,
        end - size,
        end - skipped,
        padding - stride * skipped,
    )


def _spread_weight(weight: ir.Weight, taps: tuple[NDArray[np.intp], ...]) -> ir.Weight:
    if not isinstance(weight, ir.IntWeight):
        return _spread(weight, taps)
    count = len(taps[0]) * len(taps[1])
    codes = _spread(weight.codes, taps)
    made = replace(weight, codes=codes, scale=np.repeat(weight.scale, count))
    if weight.mid_rise and any((axis < 0).any() for axis in taps):
        return replace(made, mid_rise=False, bits=weight.bits + 1)  # taps that are none are zeros
    return made


def _spread(kernels: NDArray[Any], taps: tuple[NDArray[np.intp], ...]) -> NDArray[Any]:
    """``(O, I, kH, kW)`` as ``(O·sH·sW, I, JH, JW)``."""
    rows, columns = taps
    padded = np.pad(kernels, ((0, 0), (0, 0), (0, 1), (0, 1)))  # tap −1 is the zero at the end
    picked = padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    moved = picked.transpose(0, 2, 3, 1, 4, 5)
    return np.ascontiguousarray(moved.reshape(-1, *moved.shape[3:]))


def _spread_bias(bias: ir.Bias | None, count: int) -> ir.Bias | None:
    if isinstance(bias, ir.IntBias):
        return ir.IntBias(np.repeat(bias.codes, count), np.repeat(bias.scale, count))
    return None if bias is None else np.repeat(bias, count)


def as_pixels(
    name: str, source: ir.Value, made: Subpixel, wanted: ir.Shape
) -> list[tuple[ir.Node, ir.Value]]:
    """The nodes that lay blocks out as pixels, each with the value that it writes.

    Args:
        name: of the value; those of the nodes begin with it (:func:`lays_out`).
        source: ``(N, O·sH·sW, blocks)``.
        made: the convolution that gave it.
        wanted: ``(N, O, H, W)``.
    """
    (high, wide), (blocks_high, blocks_wide) = made.stride, made.blocks
    channels, full = wanted[1], (blocks_high * high, blocks_wide * wide)
    split = (None, channels, high, wide, blocks_high, blocks_wide)
    woven = (None, channels, blocks_high, high, blocks_wide, wide)
    perm = (0, 1, 4, 2, 5, 3)
    starts = made.starts
    ends = tuple(s + int(extent or 0) for s, extent in zip(starts, wanted[2:], strict=True))
    steps: list[tuple[type[ir.Node], ir.Shape, dict[str, Any]]] = [
        (ir.Reshape, split, {}),
        (ir.Transpose, woven, {"perm": perm}),
        (ir.Reshape, (None, channels, *full), {}),
        (ir.Slice, wanted, {"axes": (2, 3), "starts": starts, "ends": ends, "steps": (1, 1)}),
    ]
    if made.stride == (1, 1):
        steps = steps[3:]
    if full == wanted[2:]:
        steps = steps[:-1]
    made_nodes = []
    for number, (kind, dims, attributes) in enumerate(steps):
        label = f"{name}{_LAYOUT}{number}"
        node = kind(label, (source.name,), label, **attributes)
        source = ir.Value(label, dims, source.grid)
        made_nodes.append((node, source))
    return made_nodes


def lays_out(name: str, number: int) -> bool:
    """Whether a node of that name is the step of :func:`as_pixels` with that number."""
    return name.endswith(f"{_LAYOUT}{number}")

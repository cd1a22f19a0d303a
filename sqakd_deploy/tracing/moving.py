"""Operators that put entries elsewhere, written as slices, permutations and reshapes.

Flips, sub-pixels, windows and circular padding: a runtime then moves codes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of, permuted
from sqakd_deploy.tracing.resizing import taken
from sqakd_deploy.tracing.shapes import noted_shape


def _flipped(node: fx.Node) -> fx.Node | None:
    x: Any = node.args[0]
    dims = noted_shape(x)
    given: Any = node.kwargs.get("dims", node.args[1:])
    axes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if dims is None or not all(type(axis) is int and axis % len(dims) for axis in axes):
        return None
    for axis in axes:
        extent = dims[axis]
        x = taken(node, x, axis % len(dims), extent, range(extent - 1, -1, -1))
    return x if isinstance(x, fx.Node) else None


def _padded_around(node: fx.Node) -> fx.Node | None:
    """Circular padding: what lies behind a border is what lies before the opposite one."""
    layer: Any = module_of(node) if node.op == "call_module" else None
    if layer is None and argument(node, 2, "mode", "constant") != "circular":
        return None
    amounts: Any = layer.padding if layer is not None else argument(node, 1, "pad", None)
    x: Any = node.args[0]
    dims = noted_shape(x)
    if dims is None or not all(type(amount) is int for amount in amounts):
        return None
    for at in range(len(amounts) // 2):  # torch counts from the last axis
        axis = len(dims) - 1 - at
        before, after = amounts[2 * at : 2 * at + 2]
        indices = [index % dims[axis] for index in range(-before, dims[axis] + after)]
        x = taken(node, x, axis, dims[axis], indices)
    return x if isinstance(x, fx.Node) else None


def _shuffled(node: fx.Node) -> fx.Node | None:
    """Channels as pixels (Shi et al., 2016)."""
    return _cut_and_moved(
        node, "upscale_factor", lambda c, h, w, r: ((c // r**2, r, r, h, w), (0, 1, 4, 2, 5, 3))
    )


def _unshuffled(node: fx.Node) -> fx.Node | None:
    """Pixels as channels."""
    return _cut_and_moved(
        node, "downscale_factor", lambda c, h, w, r: ((c, h // r, r, w // r, r), (0, 1, 3, 5, 2, 4))
    )


def _channels_shuffled(node: fx.Node) -> fx.Node | None:
    return _cut_and_moved(node, "groups", lambda c, h, w, g: ((g, c // g, h, w), (0, 2, 1, 3, 4)))


_Cut = Callable[[int, int, int, int], tuple[tuple[int, ...], tuple[int, ...]]]


def _cut_and_moved(node: fx.Node, name: str, cut: _Cut) -> fx.Node | None:
    """What a reshape, a permutation and a reshape give of ``(N, C, H, W)``."""
    factor = (
        getattr(module_of(node), name)
        if node.op == "call_module"
        else argument(node, 1, name, None)
    )
    given, dims = noted_shape(node.args[0]), noted_shape(node)
    if given is None or dims is None or len(given) != 4 or type(factor) is not int:
        return None
    sizes, order = cut(*given[1:], factor)
    x = permuted(node, call(node, "reshape", node.args[0], -1, *sizes), order)
    return call(node, "reshape", x, -1, *dims[1:])


def _windows(node: fx.Node) -> fx.Node | None:
    """``unfold`` of images: the entries of each window, one column a window."""
    names = ("kernel_size", "dilation", "padding", "stride")
    layer = module_of(node) if node.op == "call_module" else None
    found = [
        getattr(layer, name) if layer is not None else argument(node, at, name, usual)
        for at, (name, usual) in enumerate(zip(names, (None, 1, 0, 1), strict=True), 1)
    ]
    x: Any = node.args[0]
    given, dims = noted_shape(x), noted_shape(node)
    if given is None or dims is None or len(given) != 4:
        return None
    kernel, dilation, padding, stride = (
        one if isinstance(one, (tuple, list)) else (one, one) for one in found
    )
    if any(padding):
        x = call(node, F.pad, x, (padding[1], padding[1], padding[0], padding[0]))
    channels, height, width = given[1], given[2] + 2 * padding[0], given[3] + 2 * padding[1]
    apart = tuple(kernel) == tuple(stride) and not height % kernel[0] and not width % kernel[1]
    if apart and tuple(dilation) == (1, 1):
        rows, columns = height // kernel[0], width // kernel[1]
        x = call(node, "reshape", x, -1, channels, rows, kernel[0], columns, kernel[1])
        return call(node, "reshape", permuted(node, x, (0, 1, 3, 5, 2, 4)), -1, *dims[1:])
    rows, columns = (
        (extent - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis, extent in enumerate((height, width))
    )
    parts = []
    for top in range(0, kernel[0] * dilation[0], dilation[0]):
        for left in range(0, kernel[1] * dilation[1], dilation[1]):
            down = slice(top, top + (rows - 1) * stride[0] + 1, stride[0])
            right = slice(left, left + (columns - 1) * stride[1] + 1, stride[1])
            part = call(node, operator.getitem, x, (slice(None), slice(None), down, right))
            parts.append(call(node, "reshape", part, -1, channels, 1, rows * columns))
    return call(node, "reshape", call(node, torch.cat, parts, 2), -1, *dims[1:])


def _windows_of_axis(node: fx.Node) -> fx.Node | None:
    """``x.unfold(axis, size, step)``: an axis of windows, and one of their entries at the end."""
    x: Any = node.args[0]
    axis, size, step = (
        argument(node, at, name, None) for at, name in enumerate(("dimension", "size", "step"), 1)
    )
    given, dims = noted_shape(x), noted_shape(node)
    if given is None or dims is None or not all(type(one) is int for one in (axis, size, step)):
        return None
    axis %= len(given)
    if axis == 0:
        return None
    count, before = dims[axis], (slice(None),) * axis
    if size == step:
        x = taken(node, x, axis, given[axis], range(count * size))
        sizes = [*given[1:axis], count, size, *given[axis + 1 :]]
        order = [at for at in range(len(dims)) if at != axis + 1]
        return permuted(node, call(node, "reshape", x, -1, *sizes), [*order, axis + 1])
    parts = []
    for at in range(size):
        part = slice(at, at + (count - 1) * step + 1, step)
        part_of = call(node, operator.getitem, x, (*before, part))
        parts.append(call(node, "reshape", part_of, -1, *dims[1:-1], 1))
    return call(node, torch.cat, parts, len(dims) - 1)


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {
    torch.flip: _flipped,
    F.channel_shuffle: _channels_shuffled,
    F.pad: _padded_around,
    F.pixel_shuffle: _shuffled,
    F.pixel_unshuffle: _unshuffled,
    F.unfold: _windows,
}
METHODS: Mapping[str, Rewriter] = {"flip": _flipped, "unfold": _windows_of_axis}
MODULES: Mapping[type[nn.Module], Rewriter] = {
    nn.ChannelShuffle: _channels_shuffled,
    nn.CircularPad2d: _padded_around,
    nn.PixelShuffle: _shuffled,
    nn.PixelUnshuffle: _unshuffled,
    nn.Unfold: _windows,
}

"""Operators that put entries elsewhere, written as slices, permutations and reshapes.

Flips, sub-pixels and circular padding: a runtime then moves codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of, pair, permuted
from sqakd_deploy.tracing.filling import padded_with
from sqakd_deploy.tracing.resizing import taken
from sqakd_deploy.tracing.shapes import is_size, noted_shape


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


def _padded(node: fx.Node) -> fx.Node | None:
    """Circular padding, and that with a value other than zero."""
    layer: Any = module_of(node) if node.op == "call_module" else None
    value = argument(node, 3, "value", None) if layer is None else layer.value
    if value == -math.inf and (edges := _edges_for_maxima(node, layer)) is not None:
        return edges
    if value:
        return padded_with(node, value)
    return _padded_around(node) if layer is None else None


def _edges_for_maxima(node: fx.Node, layer: Any) -> fx.Node | None:
    """What only maxima read behind a border, as the entries at the border.

    They change no maximum: each window that reaches beyond has those as well. Minus infinity has no
    code.
    """
    amounts = argument(node, 1, "pad", ()) if layer is None else layer.padding
    if len(amounts) != 4 or not all(type(amount) is int and amount >= 0 for amount in amounts):
        return None
    wide, high = max(amounts[:2]), max(amounts[2:])
    for user in node.users:
        pool: Any = module_of(user) if user.op == "call_module" else None
        if pool is None and user.target is not F.max_pool2d:
            return None
        if pool is not None and not isinstance(pool, nn.MaxPool2d):
            return None
        kernel, padding, dilation = (
            pair(argument(user, at, name, usual) if pool is None else getattr(pool, name))
            for at, name, usual in ((1, "kernel_size", 0), (3, "padding", 0), (4, "dilation", 1))
        )
        if padding != (0, 0) or dilation != (1, 1) or kernel[0] <= high or kernel[1] <= wide:
            return None
    return call(node, F.pad, node.args[0], list(amounts), mode="replicate")


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


def _each_repeated(node: fx.Node) -> fx.Node | None:
    """``repeat_interleave`` by one number; along the images, each has as many parts after it."""
    x: Any = node.args[0]
    times, axis = argument(node, 1, "repeats", None), argument(node, 2, "dim", None)
    given, dims = noted_shape(x), noted_shape(node)
    numbers = type(times) is int or (isinstance(times, fx.Node) and is_size(times))
    if given is None or dims is None or type(axis) is not int or not numbers:
        return None
    axis %= len(dims)
    count = dims[axis] // given[axis]
    if axis or not count:
        return taken(node, x, axis, given[axis], [at // count for at in range(dims[axis])])
    x = taken(node, call(node, "reshape", x, -1, 1, *dims[1:]), 1, 1, [0] * count)
    return call(node, "reshape", x, -1, *dims[1:])


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {
    torch.flip: _flipped,
    torch.repeat_interleave: _each_repeated,
    F.channel_shuffle: _channels_shuffled,
    F.pad: _padded,
    F.pixel_shuffle: _shuffled,
    F.pixel_unshuffle: _unshuffled,
}
METHODS: Mapping[str, Rewriter] = {
    "flip": _flipped,
    "repeat_interleave": _each_repeated,
}
MODULES: Mapping[type[nn.Module], Rewriter] = {
    nn.ChannelShuffle: _channels_shuffled,
    nn.CircularPad2d: _padded_around,
    nn.ConstantPad2d: _padded,
    nn.PixelShuffle: _shuffled,
    nn.PixelUnshuffle: _unshuffled,
}

"""Windows of images (``unfold``) and images of windows (``fold``), as slices and reshapes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of, permuted
from sqakd_deploy.tracing.resizing import taken
from sqakd_deploy.tracing.shapes import noted_shape


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


def _overlapped(node: fx.Node) -> fx.Node | None:
    """``fold``: windows laid over each other and summed, as a mean's pool and a factor.

    Each entry of the windows makes an image of its own, zeros where it has nothing.
    """
    names = ("output_size", "kernel_size", "dilation", "padding", "stride")
    layer = module_of(node) if node.op == "call_module" else None
    found = [
        getattr(layer, name) if layer is not None else argument(node, at, name, usual)
        for at, (name, usual) in enumerate(zip(names, (None, None, 1, 0, 1), strict=True), 1)
    ]
    size, kernel, dilation, padding, stride = (
        one if isinstance(one, (tuple, list)) else (one, one) for one in found
    )
    x: Any = node.args[0]
    dims = noted_shape(node)
    if dims is None or len(dims) != 4 or noted_shape(x) is None:
        return None
    counts = [
        (size[at] + 2 * padding[at] - dilation[at] * (kernel[at] - 1) - 1) // stride[at] + 1
        for at in (0, 1)
    ]
    channels, entries = dims[1], kernel[0] * kernel[1]
    if tuple(stride) != (1, 1):  # zeros between
        x = call(node, "reshape", x, -1, channels * entries, counts[0], 1, counts[1], 1)
        x = call(node, F.pad, x, (0, stride[1] - 1, 0, 0, 0, stride[0] - 1))
        counts = [counts[at] * stride[at] for at in (0, 1)]
    x = call(node, "reshape", x, -1, channels, entries, *counts)
    images = []
    for at, places in enumerate(product(*map(range, kernel))):
        rows, columns = (
            _shift(counts[axis], place * dilation[axis] - padding[axis], size[axis])
            for axis, place in enumerate(places)
        )
        everything, entry = slice(None), slice(at, at + 1)
        parts = (everything, everything, entry, rows[0], columns[0])
        image = call(node, operator.getitem, x, parts)
        image = call(node, F.pad, image, (*columns[1], *rows[1]))
        images.append(call(node, "reshape", image, -1, channels, 1, size[0] * size[1]))
    mean = call(node, F.avg_pool2d, call(node, torch.cat, images, 2), (entries, 1))
    summed = call(node, operator.mul, mean, float(entries))
    return call(node, "reshape", summed, -1, *dims[1:])


def _shift(extent: int, start: int, size: int) -> tuple[slice, tuple[int, int]]:
    """What of an axis that begins at ``start`` lies in ``[0, size)``, and the zeros around it."""
    before, after = max(start, 0), max(size - start - extent, 0)
    return slice(max(-start, 0), min(extent, size - start)), (before, after)


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {F.fold: _overlapped, F.unfold: _windows}
METHODS: Mapping[str, Rewriter] = {"unfold": _windows_of_axis}
MODULES: Mapping[type[nn.Module], Rewriter] = {nn.Fold: _overlapped, nn.Unfold: _windows}

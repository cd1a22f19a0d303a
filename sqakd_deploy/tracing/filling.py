"""Entries that code writes into a tensor or pads it with, as parts of a concatenation."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of
from sqakd_deploy.tracing.inplace import with_item
from sqakd_deploy.tracing.shapes import noted_shape


def padded_with(node: fx.Node, value: Any) -> fx.Node | None:
    """Constants before and after a tensor of images, along each axis."""
    x: Any = node.args[0]
    layer: Any = module_of(node) if node.op == "call_module" else None
    amounts = argument(node, 1, "pad", ()) if layer is None else layer.padding
    dims = noted_shape(x)
    numbers = all(type(amount) is int and amount >= 0 for amount in amounts)
    if dims is None or not numbers or not isinstance(value, (int, float)):
        return None
    images, sizes = x, list(dims[1:])
    for at in range(len(amounts) // 2):  # torch counts from the last axis
        axis = len(dims) - 1 - at
        before, after = amounts[2 * at : 2 * at + 2]
        around = []
        for amount in (before, after):
            added = [*sizes[: axis - 1], amount, *sizes[axis:]]
            around.append(_constant(node, images, added, value))
        parts = [*around[: before > 0], x, *around[1 : 1 + (after > 0)]]
        x = call(node, torch.cat, parts, axis) if before or after else x
        sizes[axis - 1] += before + after
    return x if isinstance(x, fx.Node) else None


def _replaced(node: fx.Node) -> fx.Node | None:
    """``x[:, 2:4, 1] = value``: what is around it, and the value."""
    x, index, value = node.args
    dims = noted_shape(x)
    index = index if isinstance(index, tuple) else (index,)
    if dims is None:
        return None
    if Ellipsis in index:
        at = index.index(Ellipsis)
        whole = (slice(None),) * (len(dims) + 1 - len(index))
        index = (*index[:at], *whole, *index[at + 1 :])
    if not all(type(part) in (int, slice) for part in index) or index[0] != slice(None):
        return None
    ranges = [
        range(extent)[part] if isinstance(part, slice) else range(part % extent, part % extent + 1)
        for part, extent in zip(index, dims, strict=False)
    ]
    if any(one.step != 1 or not one for one in ranges):
        return None
    region = [len(one) for one in ranges] + list(dims[len(ranges) :])
    if isinstance(value, (int, float)):
        piece = _constant(node, x, region[1:], value)
    elif math.prod(noted_shape(value) or ()) == math.prod(region):
        piece = call(node, "reshape", value, -1, *region[1:])
    else:
        return None
    cuts = [(axis, one) for axis, one in enumerate(ranges) if len(one) < dims[axis]]
    return _around(node, x, dims, cuts, piece)


def _around(
    node: fx.Node,
    x: Any,
    dims: tuple[int, ...],
    cuts: list[tuple[int, range]],
    piece: fx.Node,
) -> fx.Node:
    """A tensor whose entries in these ranges of its axes are those of a piece."""
    if not cuts:
        return piece
    (axis, inside), *rest = cuts
    before, within, after = (
        call(node, operator.getitem, x, (*(slice(None),) * axis, part))
        for part in (
            slice(0, inside.start),
            slice(inside.start, inside.stop),
            slice(inside.stop, dims[axis]),
        )
    )
    parts = [_around(node, within, dims, rest, piece)]
    parts = [*[before][: inside.start], *parts, *[after][: dims[axis] - inside.stop]]
    return call(node, torch.cat, parts, axis)


def _constant(node: fx.Node, images: Any, sizes: Sequence[int], value: float) -> fx.Node:
    """A tensor of one value for each image."""
    one = call(node, torch.full, (1, *sizes), float(value))
    return call(node, "expand", one, call(node, "size", images, 0), *[-1] * len(sizes))


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {with_item: _replaced}

"""Resizing that takes whole pixels, or averages of them, in operators that do so.

Bilinear interpolation by any other factor stays what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sqakd_deploy.tracing.calls import argument, call, module_of
from sqakd_deploy.tracing.shapes import noted_shape

_SAME = 1e-9  # a factor and what one over a whole number is
_ARGUMENTS = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")


def is_list_of_indices(part: object) -> bool:
    """Whether a part of an index is a list of numbers, and none of truth values."""
    is_list = isinstance(part, (list, tuple)) and len(part) > 0
    return is_list and all(type(index) is int for index in part)  # type: ignore[attr-defined]


def resized(node: fx.Node) -> fx.Node | None:
    """Nearest pixels as slices, repetitions or a list of them; averages as those of a pool."""
    given, x = _arguments(node), node.args[0]
    before, after = noted_shape(x), noted_shape(node)
    if not isinstance(x, fx.Node) or before is None or after is None or len(before) != 4:
        return None
    if given["mode"] == "area":
        return call(node, F.adaptive_avg_pool2d, x, after[2:])
    if given["mode"] == "bilinear":
        return _averaged(node, x, before, after, given)
    if given["mode"] not in ("nearest", "nearest-exact"):
        return None
    sizes = list(before)
    for axis in (2, 3):
        indices = _nearest(axis - 2, sizes[axis], given)
        times = len(indices) // sizes[axis]
        if times > 1 and indices == [at // times for at in range(sizes[axis] * times)]:
            x = _repeated(node, x, axis, sizes, times)
        else:
            x = taken(node, x, axis, sizes[axis], indices)
        sizes[axis] = len(indices)
    return x


def _arguments(node: fx.Node) -> dict[str, Any]:
    if node.op == "call_module":
        layer = module_of(node)
        return {name: getattr(layer, name) for name in _ARGUMENTS[1:]} | {"antialias": False}
    found = {name: argument(node, at, name, None) for at, name in enumerate(_ARGUMENTS)}
    return found | {
        "mode": argument(node, 3, "mode", "nearest"),
        "antialias": argument(node, 6, "antialias", False),
    }


def _nearest(axis: int, extent: int, given: dict[str, Any]) -> list[int]:
    """The entry that torch takes for each of the new ones: it rounds in its own way."""
    numbers = torch.arange(extent, dtype=torch.float32).reshape(1, 1, extent)
    chosen = F.interpolate(
        numbers,
        _of(given["size"], axis),
        _of(given["scale_factor"], axis),
        given["mode"],
        recompute_scale_factor=given["recompute_scale_factor"],
    )
    return [int(index) for index in chosen.flatten().tolist()]


def taken(like: fx.Node, x: fx.Node, axis: int, extent: int, indices: Sequence[int]) -> fx.Node:
    """Entries of a tensor along an axis: itself, a slice, each several times, or a list of them.

    Args:
        like: whose line of code the new calls have.
        x: the tensor.
        axis: counted from the front, not that of the batch.
        extent: of that axis.
        indices: of the entries, from 0 on.
    """
    if list(indices) == list(range(extent)):
        return x
    before = (slice(None),) * axis
    steps = {second - first for first, second in pairwise(indices)}
    if len(indices) == 1 or (len(steps) == 1 and min(steps) > 0):
        part = slice(indices[0], indices[-1] + 1, min(steps, default=1))
        return call(like, operator.getitem, x, (*before, part))
    return call(like, operator.getitem, x, (*before, list(indices)))


def _repeated(like: fx.Node, x: fx.Node, axis: int, sizes: Sequence[int], times: int) -> fx.Node:
    """Each entry several times, by a concatenation along an axis behind its own."""
    x = call(like, "reshape", x, -1, *sizes[1 : axis + 1], 1, *sizes[axis + 1 :])
    x = call(like, torch.cat, [x] * times, axis + 1)
    return call(like, "reshape", x, -1, *sizes[1:axis], sizes[axis] * times, *sizes[axis + 1 :])


def _averaged(
    node: fx.Node,
    x: fx.Node,
    before: Sequence[int],
    after: Sequence[int],
    given: dict[str, Any],
) -> fx.Node | None:
    """A whole number of times smaller: the pixel in the middle, or the mean of the two there."""
    by_size = given["align_corners"] or given["recompute_scale_factor"]
    pairs = list(zip(before[2:], after[2:], strict=True))
    factors = [old // new for old, new in pairs]
    asked = [None if by_size else _of(given["scale_factor"], axis) for axis in (0, 1)]
    whole = all(
        old == new * factor and (scale is None or abs(scale * factor - 1) < _SAME)
        for (old, new), factor, scale in zip(pairs, factors, asked, strict=True)
    )
    if not whole or given["antialias"]:
        return None
    if factors == [1, 1]:
        return x
    if given["align_corners"]:
        return None
    kernel, first = tuple(2 - factor % 2 for factor in factors), [(f - 1) // 2 for f in factors]
    pools = kernel != (1, 1)
    steps = [None if pools else factor for factor in factors]
    parts = [slice(at or None, None, step) for at, step in zip(first, steps, strict=True)]
    if any(part != slice(None) for part in parts):
        x = call(node, operator.getitem, x, (slice(None), slice(None), *parts))
    return call(node, F.avg_pool2d, x, kernel, tuple(factors)) if pools else x


def _of(setting: Any, axis: int) -> Any:
    """What is set for an axis."""
    return setting[axis] if isinstance(setting, (tuple, list)) else setting

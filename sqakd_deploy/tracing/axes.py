"""Operators along axes (sums, means, stacks, rolls), written in others.

Means are those of a pool over pixels, whatever the axes: a runtime has an integer kernel for that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx

from sqakd_deploy.tracing.calls import Rewriter, argument, call, permuted
from sqakd_deploy.tracing.choosing import stacked_terms
from sqakd_deploy.tracing.norms import mean_of_squares, squared, sum_of_squares
from sqakd_deploy.tracing.shapes import noted_shape, noted_type

_LENGTHS = (torch.norm, torch.linalg.norm, torch.linalg.vector_norm, "norm")
_FEW = 4  # terms of a sum that are added one by one


def _mean(node: fx.Node) -> fx.Node | None:
    if (terms := _stacked_terms(node)) is not None:
        size = math.prod((noted_shape(node) or ())[1:])
        rows = [call(node, "reshape", term, -1, size, 1, 1) for term in terms]
        return _as_noted(node, call(node, "mean", call(node, torch.cat, rows, 2), (2, 3)))
    found = _reduced(node)
    if found is None:
        return None
    source, over = found
    if (of := squared(source)) is not None:
        return _as_noted(node, mean_of_squares(node, of, tuple(over)))
    if len(noted_shape(source) or ()) == 4 and over == [2, 3]:
        return None  # a global average pool as it stands
    if source.op != "call_module" and source.target in _LENGTHS:
        return None  # few numbers, of an operator in float: rounded for a pool they would lose
    return _as_noted(node, _averaged(node, source, over))


def _sum(node: fx.Node) -> fx.Node | None:
    if (terms := _stacked_terms(node)) is not None:
        return reduce(lambda total, term: call(node, operator.add, total, term), terms)
    found = _reduced(node)
    if found is None:
        return None
    source, over = found
    if (of := squared(source)) is not None:
        return _as_noted(node, call(node, sum_of_squares, of, tuple(over)))
    dims = noted_shape(source) or ()
    if len(over) == 1 and dims[over[0]] <= _FEW:
        before = (slice(None),) * over[0]
        terms = [
            call(node, operator.getitem, source, (*before, slice(at, at + 1)))
            for at in range(dims[over[0]])
        ]
        return _as_noted(
            node, reduce(lambda total, term: call(node, operator.add, total, term), terms)
        )
    mean = _averaged(node, source, over)
    return _as_noted(node, call(node, operator.mul, mean, math.prod(dims[axis] for axis in over)))


def _variance(node: fx.Node) -> fx.Node | None:
    """The mean of squared differences from the mean; over one entry less, if asked."""
    found = _differences(node)
    if found is None:
        return None
    squares = call(node, sum_of_squares, *found[:2])
    return _as_noted(node, call(node, operator.mul, squares, 1 / found[2]))


def _deviation(node: fx.Node) -> fx.Node | None:
    """Their length: its gradient is finite where all entries are alike, a root's is not."""
    found = _differences(node)
    if found is None:
        return None
    length = call(node, torch.linalg.vector_norm, found[0], 2, found[1], True)
    return _as_noted(node, call(node, operator.mul, length, found[2] ** -0.5))


def _differences(node: fx.Node) -> tuple[fx.Node, tuple[int, ...], float] | None:
    """From the mean; along which axes, and what a sum of their squares is divided by."""
    found = _reduced(node)
    if found is None:
        return None
    source, over = found
    dims = noted_shape(source) or ()
    count = math.prod(dims[axis] for axis in over)
    less = node.kwargs.get("correction", argument(node, 2, "unbiased", True))
    if not isinstance(less, (int, float)) or less >= count:
        return None
    kept = [1 if axis in over else extent for axis, extent in enumerate(dims)]
    mean = call(node, "reshape", _averaged(node, source, over), -1, *kept[1:])
    off = call(node, operator.add, source, call(node, operator.mul, mean, -1.0))
    return off, tuple(over), count - less


def _stacked_terms(node: fx.Node) -> Sequence[fx.Node] | None:
    """What a sum or mean over an axis in front of the batch is of; None for any other."""
    terms, dims = stacked_terms(node.args[0]), noted_shape(node)
    alone = argument(node, 1, "dim", None) in (0, (0,), [0]) and dims is not None
    return terms if alone and terms and dims == noted_shape(terms[0]) else None


def _reduced(node: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """What a sum or mean reads, and the axes it is over; None if it is over images."""
    source, axis = argument(node, 0, "input", None), argument(node, 1, "dim", None)
    kind = noted_type(source)
    if kind is None or not kind.is_floating_point:
        return None  # a count
    given = axis if isinstance(axis, (tuple, list)) else (axis,)
    dims, result = noted_shape(source), noted_shape(node)
    numbers = all(isinstance(one, int) for one in given)
    if not isinstance(source, fx.Node) or dims is None or not numbers or len(result or ()) < 2:
        return None
    over = sorted(one % len(dims) for one in given)
    return (source, over) if over and over[0] > 0 else None


def _averaged(node: fx.Node, source: fx.Node, over: list[int]) -> fx.Node:
    """The mean over axes, as that over the pixels of ``(N, rest, taken, 1)``."""
    dims = noted_shape(source) or ()
    rest = [axis for axis in range(1, len(dims)) if axis not in over]
    kept, taken = (math.prod(dims[axis] for axis in axes) for axes in (rest, over))
    moved = permuted(node, source, [0, *rest, *over])
    return call(node, "mean", call(node, "reshape", moved, -1, kept, taken, 1), (2, 3))


def _as_noted(node: fx.Node, value: fx.Node) -> fx.Node:
    dims = noted_shape(node) or ()
    return call(node, "reshape", value, -1, *dims[1:])


def _stacked(node: fx.Node) -> fx.Node | None:
    """Concatenated along an axis of their own."""
    tensors, rank = argument(node, 0, "tensors", None), len(noted_shape(node) or ())
    axis = argument(node, 1, "dim", 0)
    if not isinstance(tensors, (tuple, list)) or not isinstance(axis, int) or not rank:
        return None
    axis %= rank
    if axis == 0:
        return None  # along the batch
    return call(node, torch.cat, [call(node, "unsqueeze", one, axis) for one in tensors], axis)


def _rolled(node: fx.Node) -> fx.Node | None:
    """The end, then the beginning, along each axis."""
    x: Any = argument(node, 0, "input", None)
    dims = noted_shape(x)
    shifts, axes = (
        (given,) if isinstance(given, int) else given
        for given in (argument(node, 1, "shifts", None), argument(node, 2, "dims", None))
    )
    if dims is None or not axes or not shifts or len(shifts) != len(axes):
        return None  # of the flattened tensor
    if not all(isinstance(number, int) for number in (*shifts, *axes)):
        return None
    moves = [
        (axis % len(dims), shift % dims[axis]) for shift, axis in zip(shifts, axes, strict=True)
    ]
    if any(axis == 0 for axis, _ in moves):
        return None
    for axis, shift in moves:
        if not shift:
            continue
        before, cut = (slice(None),) * axis, dims[axis] - shift
        parts = [
            call(node, operator.getitem, x, (*before, part))
            for part in (slice(cut, dims[axis]), slice(0, cut))
        ]
        x = call(node, torch.cat, parts, axis)
    return x if isinstance(x, fx.Node) else None


def _narrowed(node: fx.Node) -> fx.Node | None:
    """``narrow`` as the slice that it is."""
    x = argument(node, 0, "input", None)
    axis, start, length = (
        argument(node, at, name, None) for at, name in enumerate(("dim", "start", "length"), 1)
    )
    dims = noted_shape(x)
    if dims is None or not all(type(number) is int for number in (axis, start, length)):
        return None
    axis, start = axis % len(dims), start % dims[axis]
    if axis == 0:
        return None
    return call(node, operator.getitem, x, (*(slice(None),) * axis, slice(start, start + length)))


def _joined(node: fx.Node) -> fx.Node | None:
    """The tensors of a ``split`` or ``chunk`` one by one."""
    tuple_: Any = argument(node, 0, "tensors", None)
    parts = tuple_.meta.get("tensor_meta") if isinstance(tuple_, fx.Node) else None
    axis = argument(node, 1, "dim", node.kwargs.get("axis", 0))
    if not isinstance(parts, (tuple, list)) or not isinstance(axis, int):
        return None
    pieces = [call(node, operator.getitem, tuple_, at) for at in range(len(parts))]
    return call(node, torch.cat, pieces, axis)


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {
    torch.cat: _joined,
    torch.concat: _joined,
    torch.mean: _mean,
    torch.narrow: _narrowed,
    torch.roll: _rolled,
    torch.stack: _stacked,
    torch.std: _deviation,
    torch.sum: _sum,
    torch.var: _variance,
}

METHODS: Mapping[str, Rewriter] = {
    "mean": _mean,
    "narrow": _narrowed,
    "roll": _rolled,
    "std": _deviation,
    "sum": _sum,
    "var": _variance,
}

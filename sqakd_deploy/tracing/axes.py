"""Operators along axes (sums, means, stacks, rolls, products by index), written in others.

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


def _by_index(node: fx.Node) -> fx.Node | None:
    """``einsum`` of two tensors that is a matrix product for each image (and head, and window).

    One letter is summed over, one each is of one tensor alone, and the first of all is the batch.
    """
    given: list[Any] = list(node.args)
    equation, *factors = given
    if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = list(factors[0])
    shapes = [noted_shape(factor) for factor in factors]
    if not isinstance(equation, str) or len(factors) != 2 or None in shapes:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    shared = [letter for letter in first if letter in second and letter in result]
    summed = [letter for letter in first if letter in second and letter not in result]
    left = [letter for letter in first if letter not in second]
    right = [letter for letter in second if letter not in first]
    letters = [*shared, *left, *right]
    matrices = len(summed) == len(left) == len(right) == 1 and sorted(letters) == sorted(result)
    if not matrices or "." in equation or not first[0] == second[0] == result[0] == shared[0]:
        return None
    a = permuted(node, factors[0], [first.index(letter) for letter in [*shared, *left, *summed]])
    b = permuted(node, factors[1], [second.index(letter) for letter in [*shared, *summed, *right]])
    return permuted(node, call(node, torch.matmul, a, b), [letters.index(one) for one in result])


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
    torch.einsum: _by_index,
    torch.mean: _mean,
    torch.narrow: _narrowed,
    torch.roll: _rolled,
    torch.stack: _stacked,
    torch.sum: _sum,
}

METHODS: Mapping[str, Rewriter] = {"mean": _mean, "narrow": _narrowed, "roll": _rolled, "sum": _sum}

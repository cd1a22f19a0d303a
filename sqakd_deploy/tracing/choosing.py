"""Operators that choose between entries (the largest, by a mask, by a gate), written in others.

The largest is that of a pool, which compares codes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of, permuted
from sqakd_deploy.tracing.shapes import attribute, noted_shape, noted_type

NEVER = -1e9
"""Added to a score, leaves nothing of its exponential; an infinity would make NaNs."""

_LEAST = -1e4  # a score that a mask puts below all others


def values_of_largest(node: fx.Node) -> fx.Node | None:
    """``torch.max(x, dim)[0]`` or ``.values``, of a pair whose indices nothing asks for here."""
    pair: Any = node.args[0]
    if not isinstance(pair, fx.Node) or pair.target not in (torch.max, "max"):
        return None
    axis = argument(pair, 1, "dim", None)
    if node.args[1] not in (0, "values") or type(axis) is not int:
        return None
    return _largest(node, pair.args[0], (axis,))


def _largest_along(node: fx.Node) -> fx.Node | None:
    axes = argument(node, 1, "dim", ())
    return _largest(node, node.args[0], axes if isinstance(axes, (tuple, list)) else (axes,))


def _largest(node: fx.Node, source: Any, axes: Sequence[Any]) -> fx.Node | None:
    """The largest along axes, as that of the pixels of ``(N, rest, taken, 1)``."""
    given, dims = noted_shape(source), noted_shape(node)
    if given is None or dims is None or not axes or not all(type(axis) is int for axis in axes):
        return None
    over = sorted(axis % len(given) for axis in axes)
    if over[0] == 0:
        terms = stacked_terms(source) if over == [0] else None
        return None if terms is None else _largest_of(node, terms)
    x = source
    if (len(given), over) != (4, [2, 3]):
        rest = [axis for axis in range(1, len(given)) if axis not in over]
        kept, taken = (math.prod(given[axis] for axis in some) for some in (rest, over))
        x = call(node, "reshape", permuted(node, x, [0, *rest, *over]), -1, kept, taken, 1)
    return call(node, "reshape", call(node, F.adaptive_max_pool2d, x, 1), -1, *dims[1:])


def stacked_terms(source: Any) -> Sequence[fx.Node] | None:
    """What ``torch.stack`` puts along an axis in front of the batch; None for all else."""
    if not isinstance(source, fx.Node) or source.target is not torch.stack:
        return None
    terms, axis = argument(source, 0, "tensors", ()), argument(source, 1, "dim", 0)
    whole = isinstance(terms, (tuple, list)) and axis in (0, -len(noted_shape(source) or ()))
    return terms if whole else None


def _larger(node: fx.Node) -> fx.Node | None:
    """``torch.max`` or ``maximum`` of two tensors of one shape."""
    terms = (node.args[0], argument(node, 1, "other", None))
    alike = all(noted_shape(term) == noted_shape(node) for term in terms)
    computed = all(isinstance(term, fx.Node) and term.op != "get_attr" for term in terms)
    return _largest_of(node, terms) if alike and computed else None


def _largest_of(node: fx.Node, terms: Sequence[Any]) -> fx.Node | None:
    dims = noted_shape(node)
    if dims is None or len(dims) < 2:
        return None
    rows = [call(node, "reshape", term, -1, dims[1], 1, math.prod(dims[2:])) for term in terms]
    pooled = call(node, F.max_pool2d, call(node, torch.cat, rows, 2), (len(rows), 1))
    return call(node, "reshape", pooled, -1, *dims[1:])


def _masked(node: fx.Node) -> fx.Node | None:
    """``torch.where(mask, x, value)`` of a constant mask, or the two the other way round."""
    mask, first, second = (
        argument(node, at, name, None) for at, name in enumerate(("condition", "input", "other"))
    )
    if _is_constant(second):
        return _with_mask(node, first, mask, second, kept=True)
    return _with_mask(node, second, mask, first, kept=False) if _is_constant(first) else None


def _filled(node: fx.Node) -> fx.Node | None:
    """``x.masked_fill(mask, value)`` of a constant mask."""
    mask, value = (argument(node, at, name, None) for at, name in enumerate(("mask", "value"), 1))
    return _with_mask(node, node.args[0], mask, value, kept=False)


def _is_constant(value: Any) -> bool:
    return isinstance(value, (int, float)) or _is_attribute(value)


def _with_mask(node: fx.Node, x: Any, mask: Any, value: Any, *, kept: bool) -> fx.Node | None:
    """A product with ones and zeros, and a sum; of scores that are masked out, a sum alone."""
    constants = isinstance(mask, fx.Node) and mask.op == "get_attr" and _is_constant(value)
    if not constants or noted_shape(x) != noted_shape(node) or _is_constant(x):
        return None

    def chosen(where_kept: float, elsewhere: Any) -> fx.Node:
        pair = (where_kept, elsewhere) if kept else (elsewhere, where_kept)
        return call(node, torch.where, mask, *pair)

    if isinstance(value, (int, float)) and value <= _LEAST:
        return call(node, operator.add, x, chosen(0.0, NEVER))
    product = call(node, operator.mul, x, chosen(1.0, 0.0))
    nothing = isinstance(value, (int, float)) and not value
    return product if nothing else call(node, operator.add, product, chosen(0.0, value))


def _magnitude(node: fx.Node) -> fx.Node | None:
    """``|x|``: a LeakyReLU that turns what is negative round, for which there is a kernel."""
    kind = noted_type(node.args[0])
    real = kind is not None and kind.is_floating_point
    return call(node, F.leaky_relu, node.args[0], -1.0) if real else None


def _within(node: fx.Node) -> fx.Node | None:
    """``clamp`` between numbers that the model holds as buffers; infinite ones bound nothing."""
    bounds = [argument(node, at, name, None) for at, name in enumerate(("min", "max"), 1)]
    owner = node.graph.owning_module
    if owner is None or not any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    found = [
        attribute(owner, str(bound.target)) if _is_attribute(bound) else bound for bound in bounds
    ]
    if any(isinstance(bound, (fx.Node, nn.Parameter)) for bound in found):
        return None
    if any(isinstance(bound, Tensor) and bound.numel() != 1 for bound in found):
        return None
    low, high = (None if bound is None else float(bound) for bound in found)
    low, high = None if low == -math.inf else low, None if high == math.inf else high
    x: Any = node.args[0]
    return x if low is high is None else call(node, torch.clamp, x, low, high)


def _is_attribute(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _gated(node: fx.Node) -> fx.Node | None:
    """A gated linear unit: one half times the sigmoid of the other (Dauphin et al., 2017)."""
    axis = module_of(node).dim if node.op == "call_module" else argument(node, 1, "dim", -1)
    x, dims = node.args[0], noted_shape(node)
    if dims is None or type(axis) is not int or not axis % len(dims):
        return None
    axis %= len(dims)
    before, half = (slice(None),) * axis, dims[axis]
    values, gate = (
        call(node, operator.getitem, x, (*before, part))
        for part in (slice(0, half), slice(half, 2 * half))
    )
    return call(node, operator.mul, values, call(node, torch.sigmoid, gate))


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {
    F.glu: _gated,
    getattr: values_of_largest,
    torch.abs: _magnitude,
    torch.amax: _largest_along,
    torch.clamp: _within,
    torch.clip: _within,
    torch.masked_fill: _filled,
    torch.max: _larger,
    torch.maximum: _larger,
    torch.where: _masked,
}
METHODS: Mapping[str, Rewriter] = {
    "abs": _magnitude,
    "amax": _largest_along,
    "clamp": _within,
    "clip": _within,
    "masked_fill": _filled,
    "max": _larger,
    "maximum": _larger,
}
MODULES: Mapping[type[nn.Module], Rewriter] = {nn.GLU: _gated}

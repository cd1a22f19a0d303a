"""Operators that are others in a row, written as those: the table of meanings stays short.

Shapes must be known. Each rewriting computes the same numbers; a product with a reciprocal stands
for a quotient in student and file alike.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy.tracing import (
    axes,
    choosing,
    filling,
    moving,
    norms,
    products,
    sequences,
    windows,
)
from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of, permuted
from sqakd_deploy.tracing.resizing import resized, taken
from sqakd_deploy.tracing.shapes import noted_shape, noted_type
from sqakd_deploy.tracing.units import write_gelu


def rewrite(traced: fx.GraphModule) -> None:
    """Write attention, unbound tensors, quotients and the like in simpler operators.

    Args:
        traced: with the shapes of its tensors; changed in place. New nodes have none.
    """
    write_gelu(traced)
    for node, rewriter in [(node, _rewriter_of(node)) for node in traced.graph.nodes]:
        if rewriter is None:
            continue
        with traced.graph.inserting_before(node):
            found = rewriter(node)
        if found is not None:
            if "tensor_meta" in node.meta:  # that of new nodes is not known
                found.meta.setdefault("tensor_meta", node.meta["tensor_meta"])
            node.replace_all_uses_with(found)


def _rewriter_of(node: fx.Node) -> Rewriter | None:
    if node.op == "call_module":
        return _MODULES.get(type(module_of(node)))
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _attention(node: fx.Node) -> fx.Node | None:
    """``softmax(q·kᵀ·scale + mask)·v`` (Vaswani et al., 2017, eq. 1)."""
    query, key, value = (
        argument(node, i, n, None) for i, n in enumerate(("query", "key", "value"))
    )
    mask = argument(node, 3, "attn_mask", None)
    chances = argument(node, 4, "dropout_p", 0.0), argument(node, 5, "is_causal", False)
    width = (noted_shape(query) or (0,))[-1]
    if any(chances) or node.kwargs.get("enable_gqa") or not width:
        return None
    scale = node.kwargs.get("scale")
    scores = call(node, torch.matmul, query, call(node, "transpose", key, -2, -1))
    # The factor comes after the product, so that codes are multiplied, not scaled codes.
    scores = call(node, operator.mul, scores, width**-0.5 if scale is None else scale)
    if mask is not None and noted_type(mask) == torch.bool:
        mask = call(node, torch.where, mask, 0.0, choosing.NEVER)
    if mask is not None:
        scores = call(node, operator.add, scores, mask)
    return call(node, torch.matmul, call(node, F.softmax, scores, dim=-1), value)


def _taken(node: fx.Node) -> fx.Node | None:
    """One of the tensors along an axis, which need not be that of the batch any more.

    As in ``q, k, v = qkv.reshape(n, t, 3, heads, d).permute(2, 0, 3, 1, 4)``: the axis is cut where
    the batch is still the first one, and the rest permuted.
    """
    source: Any = node.args[0]
    index: Any = node.args[1]
    if (largest := choosing.values_of_largest(node)) is not None:
        return largest
    if isinstance(index, tuple) and None in index:
        return _with_new_axes(node, source, tuple(part for part in index if part is not None))
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    axis = 0
    if source.target in (torch.unbind, "unbind"):
        axis = argument(source, 1, "dim", 0)
        source = source.args[0]
    dims = noted_shape(source)
    if dims is None or not isinstance(axis, int):
        return None
    axis %= len(dims)
    behind = _permuted_before(source) if axis == 0 else None
    source = source if behind is None else behind
    dims = noted_shape(source) or dims
    order = _order(source, len(dims))
    if order is not None and order[0] != 0:
        source = source.args[0]
    else:
        order = list(range(len(dims)))
    cut = order.pop(axis)
    if cut == 0:
        return None  # an image of the batch
    index %= dims[axis]
    ranges = (*(slice(None),) * cut, slice(index, index + 1))
    piece = call(node, "squeeze", call(node, operator.getitem, source, ranges), cut)
    piece = permuted(node, piece, [at - (at > cut) for at in order])
    rest = (noted_shape(node) or ())[1:]
    return piece if behind is None else call(node, "reshape", piece, -1, *rest)


def _permuted_before(node: fx.Node) -> fx.Node | None:
    """What was permuted, where the batch moved behind an axis that a reshape then left alone.

    As in ``qkv.permute(2, 0, 3, 1, 4).reshape(3, n * heads, t, d).unbind(0)``.
    """
    source = node.args[0] if node.target in (torch.reshape, "reshape", "view") else None
    given, dims = noted_shape(source), noted_shape(node)
    if not isinstance(source, fx.Node) or given is None or dims is None or given[0] != dims[0]:
        return None
    order = _order(source, len(given))
    return source if order is not None and order[0] != 0 else None


def _with_new_axes(node: fx.Node, source: fx.Node, index: tuple[Any, ...]) -> fx.Node | None:
    """What ``x[:, None]`` takes, without the axes of size 1, and then those."""
    dims, given = noted_shape(node), noted_shape(source)
    first = node.args[1][0]  # type: ignore[index]
    in_front = not (first is Ellipsis or first == slice(None))
    if dims is None or given is None or in_front or dims[0] != given[0]:
        return None
    whole = all(part is Ellipsis or part == slice(None) for part in index)
    taken = source if whole else call(node, operator.getitem, source, index)
    return call(node, "reshape", taken, -1, *dims[1:])


def _order(node: fx.Node, rank: int) -> list[int] | None:
    """The order of a permutation; None for any other node."""
    if node.target not in (torch.permute, "permute"):
        return None
    given: Any = node.kwargs.get("dims", node.args[1:])
    axes = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
    return [axis % rank for axis in axes]


def _quotient(node: fx.Node) -> fx.Node | None:
    by = argument(node, 1, "other", None)
    if noted_shape(node) is None or node.kwargs.get("rounding_mode"):
        return None
    if isinstance(node.args[0], (int, float)):
        inverse = call(node, torch.reciprocal, by)
        return inverse if node.args[0] == 1 else call(node, operator.mul, inverse, node.args[0])
    if isinstance(by, fx.Node) and by.op == "get_attr":
        return call(node, operator.mul, node.args[0], call(node, torch.reciprocal, by))
    plain = isinstance(by, (int, float)) and by
    return call(node, operator.mul, node.args[0], 1 / by) if plain else None


def _difference(node: fx.Node) -> fx.Node | None:
    first, second = node.args[0], argument(node, 1, "other", None)
    if noted_shape(node) is None or node.kwargs.get("alpha", 1) != 1:
        return None
    if isinstance(second, (int, float)):
        return call(node, operator.add, first, -second)
    return call(node, operator.add, first, call(node, operator.mul, second, -1.0))


def _negative(node: fx.Node) -> fx.Node | None:
    number = noted_shape(node) is None
    return None if number else call(node, operator.mul, node.args[0], -1.0)


def _power(node: fx.Node) -> fx.Node | None:
    square = argument(node, 1, "exponent", 2) == 2 and noted_shape(node) is not None
    return call(node, operator.mul, node.args[0], node.args[0]) if square else None


def _inverse_root(node: fx.Node) -> fx.Node:
    return call(node, torch.reciprocal, call(node, torch.sqrt, node.args[0]))


def _sum_of_product(node: fx.Node) -> fx.Node:
    term, first, second = node.args[0], *node.args[1:3]
    factors = call(node, operator.mul, first, second)
    value = node.kwargs.get("value", 1)
    scaled = factors if value == 1 else call(node, operator.mul, factors, value)
    return call(node, operator.add, term, scaled)


def _reshape_as(node: fx.Node) -> fx.Node | None:
    dims = noted_shape(node)
    return None if dims is None else call(node, "reshape", node.args[0], -1, *dims[1:])


_ELEMENTWISE = (operator.mul, torch.mul, "mul", operator.add, torch.add, "add")


def _expanded(node: fx.Node) -> fx.Node | None:
    """Nothing, where all readers would broadcast it themselves; else entries taken repeatedly."""
    source, whole = node.args[0], noted_shape(node)
    if not isinstance(source, fx.Node) or noted_shape(source) is None:
        return None
    if all(_broadcasts(user, node, whole) for user in node.users):
        return source
    return None if source.op == "get_attr" else _spread(node, source, whole or ())


def _broadcasts(user: fx.Node, node: fx.Node, whole: tuple[int, ...] | None) -> bool:
    partners = [term for term in user.args if term is not node]
    alike = len(partners) == 1 and noted_shape(partners[0]) in (whole, noted_shape(user))
    return user.target in _ELEMENTWISE and not user.kwargs and alike


def _tiled(node: fx.Node) -> fx.Node | None:
    """``repeat`` along axes of an image."""
    source = node.args[0]
    computed = isinstance(source, fx.Node) and source.op != "get_attr"
    return _spread(node, source, noted_shape(node) or ()) if computed else None  # type: ignore[arg-type]


def _spread(node: fx.Node, source: fx.Node, whole: tuple[int, ...]) -> fx.Node | None:
    """A tensor's entries again and again along its axes, to that shape; None along the batch."""
    dims = noted_shape(source)
    if dims is None or len(dims) != len(whole) or dims[0] != whole[0]:
        return None
    for axis, (old, new) in enumerate(zip(dims, whole, strict=True)):
        source = taken(node, source, axis, old, [at % old for at in range(new)])
    return source


def _product(node: fx.Node) -> fx.Node | None:
    return norms.over_root(node) or _sum(node)


def _sum(node: fx.Node) -> fx.Node | None:
    return _spread_for_constant(node) or _spread_for_each_other(node)


def _spread_for_constant(node: fx.Node) -> fx.Node | None:
    """A product or sum with a constant that has more entries than the tensor."""
    whole = noted_shape(node)
    constants = [term for term in node.args if isinstance(term, fx.Node) and term.op == "get_attr"]
    others = [term for term in node.args if isinstance(term, fx.Node) and term.op != "get_attr"]
    if whole is None or node.kwargs or not len(constants) == len(others) == 1:
        return None
    dims = noted_shape(others[0])
    if dims is None or dims == whole:
        return None
    spread = _spread(node, others[0], whole)
    target: Any = node.target
    return None if spread is None else call(node, target, spread, constants[0])


def _spread_for_each_other(node: fx.Node) -> fx.Node | None:
    """A product or sum of two tensors, each of size 1 along an axis where the other is not."""
    whole, dims = noted_shape(node), [noted_shape(term) for term in node.args]
    terms = [term for term in node.args if isinstance(term, fx.Node) and term.op != "get_attr"]
    if whole is None or node.kwargs or len(terms) != 2 or None in dims or whole in dims:
        return None
    spread = _spread(node, terms[0], whole)
    target: Any = node.target
    return None if spread is None else call(node, target, spread, terms[1])


def _opposite(node: fx.Node) -> fx.Node | None:
    """``rsub``: a difference the other way round."""
    first, second = argument(node, 1, "other", None), node.args[0]
    if noted_shape(node) is None or node.kwargs.get("alpha", 1) != 1:
        return None
    return call(node, operator.add, call(node, operator.mul, second, -1.0), first)


def _converted(node: fx.Node) -> fx.Node | None:
    """Nothing, where the type is as it was: the device is the model's."""
    source = node.args[0]
    same = noted_type(node) is not None and noted_type(node) == noted_type(source)
    return source if same and isinstance(source, fx.Node) else None


_FUNCTIONS: Mapping[Any, Rewriter] = {
    F.scaled_dot_product_attention: _attention,
    operator.getitem: _taken,
    operator.truediv: _quotient,
    torch.div: _quotient,
    operator.sub: _difference,
    torch.sub: _difference,
    operator.neg: _negative,
    torch.neg: _negative,
    operator.pow: _power,
    torch.pow: _power,
    torch.square: _power,
    torch.rsqrt: _inverse_root,
    torch.addcmul: _sum_of_product,
    F.interpolate: resized,
    operator.mul: _product,
    torch.mul: _product,
    operator.add: _sum,
    torch.add: _sum,
    torch.rsub: _opposite,
    **axes.FUNCTIONS,
    **choosing.FUNCTIONS,
    **filling.FUNCTIONS,
    **moving.FUNCTIONS,
    **norms.FUNCTIONS,
    **products.FUNCTIONS,
    **sequences.FUNCTIONS,
    **windows.FUNCTIONS,
}
_MODULES: Mapping[type[nn.Module], Rewriter] = {
    nn.Upsample: resized,
    nn.UpsamplingBilinear2d: resized,
    nn.UpsamplingNearest2d: resized,
    **choosing.MODULES,
    **moving.MODULES,
    **norms.MODULES,
    **sequences.MODULES,
    **windows.MODULES,
}
_METHODS: Mapping[str, Rewriter] = {
    "div": _quotient,
    "sub": _difference,
    "neg": _negative,
    "pow": _power,
    "square": _power,
    "rsqrt": _inverse_root,
    "addcmul": _sum_of_product,
    "reshape_as": _reshape_as,
    "view_as": _reshape_as,
    "float": _converted,
    "to": _converted,
    "type_as": _converted,
    "add": _sum,
    "mul": _product,
    "expand": _expanded,
    "expand_as": _expanded,
    "repeat": _tiled,
    **axes.METHODS,
    **choosing.METHODS,
    **moving.METHODS,
    **windows.METHODS,
}

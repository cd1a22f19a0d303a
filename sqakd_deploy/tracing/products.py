"""Products by index (``einsum``), as matrix products and convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from sqakd_deploy.tracing.calls import Rewriter, call, permuted
from sqakd_deploy.tracing.lifting import free_name, prefix_of
from sqakd_deploy.tracing.shapes import attribute, noted_shape


def _by_index(node: fx.Node) -> fx.Node | None:
    """``einsum`` of two tensors, the first axis of whose result counts images."""
    given: list[Any] = list(node.args)
    equation, *factors = given
    if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = list(factors[0])
    shapes = [noted_shape(factor) for factor in factors]
    if not isinstance(equation, str) or len(factors) != 2 or None in shapes:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if "." in equation or not result or any(len(set(one)) < len(one) for one in (first, second)):
        return None
    constants = [factor.op == "get_attr" for factor in factors]
    if constants[0] and not constants[1]:
        return _with_weight(node, (second, first), result, factors[::-1])
    if constants[1]:
        return _with_weight(node, (first, second), result, factors)
    return _of_images(node, (first, second), result, factors)


def _of_images(
    node: fx.Node, letters: tuple[str, str], result: str, factors: Sequence[Any]
) -> fx.Node | None:
    """A matrix product for each image (and head, and window).

    One letter is summed over, one each is of one tensor alone, and the first of all is the batch.
    """
    first, second = letters
    shared, summed, left, right = _kinds(first, second, result)
    order = [*shared, *left, *right]
    matrices = len(summed) == len(left) == len(right) == 1 and sorted(order) == sorted(result)
    if not matrices or not first[0] == second[0] == result[0] == shared[0]:
        return None
    a = permuted(node, factors[0], [first.index(letter) for letter in [*shared, *left, *summed]])
    b = permuted(node, factors[1], [second.index(letter) for letter in [*shared, *summed, *right]])
    return permuted(node, call(node, torch.matmul, a, b), [order.index(one) for one in result])


def _with_weight(
    node: fx.Node, letters: tuple[str, str], result: str, factors: Sequence[Any]
) -> fx.Node | None:
    """A convolution of 1×1: what both have and the result keeps counts its groups."""
    first, second = letters
    shared, summed, left, right = _kinds(first, second, result)
    images = left[:1]
    order = [*images, *shared, *right, *left[1:]]
    owner, dims = node.graph.owning_module, noted_shape(factors[0])
    if not images or not images[0] == first[0] == result[0] or owner is None or dims is None:
        return None
    if not summed or sorted(order) != sorted(result):
        return None
    weight: Any = attribute(owner, str(factors[1].target))
    extents = dict(zip(first, dims, strict=True)) | dict(zip(second, weight.shape, strict=True))
    groups, inputs, outputs, pixels = (
        math.prod(extents[letter] for letter in some) for some in (shared, summed, right, left[1:])
    )
    rows = weight.detach().permute([second.index(letter) for letter in [*shared, *right, *summed]])
    layer = nn.Conv2d(
        groups * inputs, groups * outputs, 1, groups=groups, bias=False, device="meta"
    )
    layer.weight = nn.Parameter(
        rows.reshape(groups * outputs, inputs, 1, 1).clone(), requires_grad=weight.requires_grad
    )
    path = free_name(owner, f"{prefix_of(node)}einsum")
    owner.add_submodule(path, layer.eval())
    x = permuted(
        node, factors[0], [first.index(one) for one in [*images, *shared, *summed, *left[1:]]]
    )
    x = node.graph.call_module(path, (call(node, "reshape", x, -1, groups * inputs, pixels, 1),))
    x.stack_trace = node.stack_trace
    x = call(node, "reshape", x, -1, *(extents[letter] for letter in order[1:]))
    return permuted(node, x, [order.index(letter) for letter in result])


def _kinds(first: str, second: str, result: str) -> tuple[list[str], ...]:
    """Letters of both that stay, of both that are summed over, of the first, of the second."""
    shared = [letter for letter in first if letter in second and letter in result]
    summed = [letter for letter in first if letter in second and letter not in result]
    left = [letter for letter in first if letter not in second]
    right = [letter for letter in second if letter not in first]
    return shared, summed, left, right


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {torch.einsum: _by_index}

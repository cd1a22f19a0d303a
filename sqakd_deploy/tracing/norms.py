"""Normalisations, written in others: their squares are summed in float.

A mean of squares loses to 8 bits what a small input is divided by; to 0, where it is small enough.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of
from sqakd_deploy.tracing.shapes import noted_shape, noted_type


def sum_of_squares(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``Σ x²`` along axes, which stay with size 1."""
    return x.square().sum(axes, keepdim=True)


def mean_of_squares(node: fx.Node, x: Any, axes: tuple[int, ...]) -> fx.Node:
    """A new one, along axes of a tensor of known shape; they stay."""
    dims = noted_shape(x) or ()
    count = math.prod(dims[axis] for axis in axes)
    return call(node, operator.mul, call(node, sum_of_squares, x, axes), 1 / count)


def squared(source: Any) -> Any:
    """What a square is of; None for any other node."""
    products = (operator.mul, torch.mul, "mul")
    square = isinstance(source, fx.Node) and source.target in products and len(source.args) == 2
    return source.args[0] if square and source.args[0] is source.args[1] else None


def _rms_norm(node: fx.Node) -> fx.Node | None:
    """``x/√(mean of x² + ε) · weight`` (Zhang and Sennrich, 2019, eq. 4)."""
    names = ("normalized_shape", "weight", "eps")
    if node.op == "call_module":
        layer: Any = module_of(node)
        sizes, epsilon = layer.normalized_shape, layer.eps
        held = layer.weight is not None
        weight = node.graph.get_attr(f"{node.target}.weight") if held else None
    else:
        sizes, weight, epsilon = (
            argument(node, at, name, None) for at, name in enumerate(names, 1)
        )
    x, kind = node.args[0], noted_type(node)
    dims = noted_shape(x)
    if dims is None or kind is None:
        return None
    epsilon = torch.finfo(kind).eps if epsilon is None else epsilon
    axes = tuple(range(len(dims) - len(sizes), len(dims)))
    mean = call(node, operator.add, mean_of_squares(node, x, axes), epsilon)
    normed = call(node, operator.truediv, x, call(node, torch.sqrt, mean))
    return normed if weight is None else call(node, operator.mul, normed, weight)


def over_root(node: fx.Node) -> fx.Node | None:
    """``x · rsqrt(y)`` as a quotient, in float: neither the root nor its inverse is rounded."""
    factors = node.args[0], argument(node, 1, "other", None)
    for x, inverse in (factors, factors[::-1]):
        of = _inverted(inverse)
        if isinstance(x, fx.Node) and of is not None and noted_shape(x) == noted_shape(node):
            return call(node, operator.truediv, x, of)
    return None


def _inverted(node: Any) -> fx.Node | None:
    """The root whose inverse a node is."""
    of = node.args[0] if isinstance(node, fx.Node) and node.target is torch.reciprocal else None
    return of if isinstance(of, fx.Node) and of.target is torch.sqrt else None


def _group_norm(node: fx.Node) -> fx.Node | None:
    names = ("input", "num_groups", "weight", "bias", "eps")
    found = [argument(node, at, name, None) for at, name in enumerate(names)]
    *known, epsilon = found
    return _grouped(node, *known, epsilon=1e-5 if epsilon is None else epsilon)


def _group_norm_layer(node: fx.Node) -> fx.Node | None:
    layer: Any = module_of(node)
    return _grouped_layer(node, layer, layer.num_groups)


def _instance_norm(node: fx.Node) -> fx.Node | None:
    """A group for each channel (Ulyanov et al., 2016); not by statistics of training."""
    source, running = node.args[0], argument(node, 1, "running_mean", None)
    dims = noted_shape(source)
    if dims is None or running is not None or not argument(node, 5, "use_input_stats", True):
        return None
    weight, bias = (argument(node, at, name, None) for at, name in ((3, "weight"), (4, "bias")))
    return _grouped(node, source, dims[1], weight, bias, epsilon=argument(node, 7, "eps", 1e-5))


def _instance_norm_layer(node: fx.Node) -> fx.Node | None:
    layer: Any = module_of(node)
    dims = noted_shape(node.args[0])
    return (
        None if dims is None or layer.track_running_stats else _grouped_layer(node, layer, dims[1])
    )


def _grouped_layer(node: fx.Node, layer: Any, groups: int) -> fx.Node | None:
    affine = [
        None if value is None else node.graph.get_attr(f"{node.target}.{name}")
        for name, value in (("weight", layer.weight), ("bias", layer.bias))
    ]
    return _grouped(node, node.args[0], groups, *affine, epsilon=layer.eps)


def _grouped(
    node: fx.Node, source: Any, groups: int, weight: Any, bias: Any, *, epsilon: float
) -> fx.Node | None:
    """LayerNorm of each group of channels, then a factor and a term for each channel."""
    dims = noted_shape(source)
    if dims is None:
        return None
    channels, pixels = dims[1], math.prod(dims[2:])
    width = channels // groups * pixels
    x = call(node, "reshape", source, -1, groups, width)
    x = call(node, F.layer_norm, x, (width,), None, None, epsilon)
    x = call(node, "reshape", x, -1, channels, pixels)
    for function, values in ((operator.mul, weight), (operator.add, bias)):
        if values is not None:
            x = call(node, function, x, call(node, "reshape", values, 1, channels, 1))
    return call(node, "reshape", x, -1, *dims[1:])


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.rms_norm: _rms_norm,
}
MODULES: Mapping[type[nn.Module], Rewriter] = {
    nn.GroupNorm: _group_norm_layer,
    nn.InstanceNorm1d: _instance_norm_layer,
    nn.InstanceNorm2d: _instance_norm_layer,
    nn.RMSNorm: _rms_norm,
}

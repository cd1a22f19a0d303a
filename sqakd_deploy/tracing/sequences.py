"""Layers of sequences ``(N, C, L)``, as those of the rows of images ``(N, C, L, 1)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy.tracing.calls import Rewriter, argument, call, module_of
from sqakd_deploy.tracing.shapes import noted_shape


def _layer(node: fx.Node) -> fx.Node | None:
    """A convolution or BatchNorm; another call may have made it one of rows already."""
    layer, owner = module_of(node), node.graph.owning_module
    dims, rows = noted_shape(node), _as_rows(node)
    if dims is None or rows is None or owner is None:
        return None
    if isinstance(layer, nn.Conv1d) and layer.padding_mode != "zeros":
        return None
    path = str(node.target)
    if isinstance(layer, nn.Conv1d):
        owner.set_submodule(path, _conv_along_rows(layer))
    elif isinstance(layer, nn.BatchNorm1d):
        owner.set_submodule(path, _norm_of_rows(layer))
    result = node.graph.call_module(path, (rows,))
    result.stack_trace = node.stack_trace
    return call(node, "reshape", result, -1, *dims[1:])


def _pool_to_size(node: fx.Node) -> fx.Node | None:
    """An adaptive pool, by its function."""
    layer: Any = module_of(node) if node.op == "call_module" else None
    size = argument(node, 1, "output_size", None) if layer is None else layer.output_size
    maxima = node.target is F.adaptive_max_pool1d or isinstance(layer, nn.AdaptiveMaxPool1d)
    dims, rows = noted_shape(node), _as_rows(node)
    if dims is None or rows is None or getattr(layer, "return_indices", False):
        return None
    length = size[0] if isinstance(size, (tuple, list)) else size
    pool = F.adaptive_max_pool2d if maxima else F.adaptive_avg_pool2d
    return call(node, "reshape", call(node, pool, rows, (length, 1)), -1, *dims[1:])


def _average_pool(node: fx.Node) -> fx.Node | None:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    kernel, stride, padding, *flags = _settings(node, names, (None, None, 0, False, True))
    window = [_along_rows(kernel, 1), _along_rows(stride or kernel, 1), _along_rows(padding, 0)]
    return _pooled(node, F.avg_pool2d, *window, *flags)


def _max_pool(node: fx.Node) -> fx.Node | None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = (None, None, 0, 1, False, False)
    kernel, stride, padding, dilation, ceil_mode, indices = _settings(node, names, defaults)
    window = [_along_rows(kernel, 1), _along_rows(stride or kernel, 1), _along_rows(padding, 0)]
    pooled = (F.max_pool2d, *window, _along_rows(dilation, 1), ceil_mode)
    return None if indices else _pooled(node, *pooled)


def _settings(node: fx.Node, names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """Of the layer, or of the call."""
    layer = module_of(node) if node.op == "call_module" else None
    return [
        argument(node, at, name, default) if layer is None else getattr(layer, name)
        for at, (name, default) in enumerate(zip(names, defaults, strict=True), 1)
    ]


def _along_rows(value: Any, across: int) -> tuple[Any, int]:
    return (value[0] if isinstance(value, (tuple, list)) else value, across)


def _pooled(node: fx.Node, pool: Callable[..., Any], *window: Any) -> fx.Node | None:
    dims, rows = noted_shape(node), _as_rows(node)
    if dims is None or rows is None:
        return None
    return call(node, "reshape", call(node, pool, rows, *window), -1, *dims[1:])


def _as_rows(node: fx.Node) -> fx.Node | None:
    """What the node reads as ``(N, C, L, 1)``; that of a convolution in front, if it is one."""
    source: Any = node.args[0]
    given = noted_shape(source)
    if given is None or len(given) != 3:
        return None
    if source.target == "reshape" and source.args[0].op == "call_module":
        convolution: fx.Node = source.args[0]
        if type(module_of(convolution)) is nn.Conv2d and source.args[1:] == (-1, *given[1:]):
            return convolution
    return call(node, "reshape", source, -1, *given[1:], 1)


def _conv_along_rows(layer: nn.Conv1d) -> nn.Conv2d:
    padding = layer.padding
    wide = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], 1),
        (layer.stride[0], 1),
        padding if isinstance(padding, str) else (padding[0], 0),
        (layer.dilation[0], 1),
        layer.groups,
        layer.bias is not None,
        device="meta",
    )
    wide.weight, wide.bias = nn.Parameter(layer.weight.detach().unsqueeze(-1)), layer.bias
    return wide.eval()


def _norm_of_rows(layer: nn.BatchNorm1d) -> nn.BatchNorm2d:
    settings = (layer.num_features, layer.eps, layer.momentum, layer.affine)
    norm = nn.BatchNorm2d(*settings, device="meta")
    norm.weight, norm.bias = layer.weight, layer.bias
    norm.running_mean, norm.running_var = layer.running_mean, layer.running_var
    norm.num_batches_tracked = layer.num_batches_tracked
    return norm.eval()


FUNCTIONS: Mapping[Callable[..., Any], Rewriter] = {
    F.adaptive_avg_pool1d: _pool_to_size,
    F.adaptive_max_pool1d: _pool_to_size,
    F.avg_pool1d: _average_pool,
    F.max_pool1d: _max_pool,
    torch.max_pool1d: _max_pool,
}
MODULES: Mapping[type[nn.Module], Rewriter] = {
    nn.AdaptiveAvgPool1d: _pool_to_size,
    nn.AdaptiveMaxPool1d: _pool_to_size,
    nn.AvgPool1d: _average_pool,
    nn.MaxPool1d: _max_pool,
    nn.BatchNorm1d: _layer,
    nn.Conv1d: _layer,
}

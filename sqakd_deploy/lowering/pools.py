"""Pools of a traced model, in the terms of :mod:`sqakd_deploy.graph`."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ModelError
from sqakd_deploy.lowering.meaning import Identity, Op, setting
from sqakd_deploy.tracing.calls import pair
from sqakd_deploy.tracing.trace import describe, shape


def _window(node: fx.Node, module: nn.Module | None) -> dict[str, Any]:
    kernel = pair(setting(node, module, "kernel_size", 1, None))
    stride = setting(node, module, "stride", 2, None)
    rows, columns = pair(setting(node, module, "padding", 3, 0))
    return {
        "kernel": kernel,
        "stride": pair(stride) if stride else kernel,
        "padding": (rows, columns, rows, columns),
    }


def max_pool(node: fx.Node, module: nn.Module | None) -> Op:
    """MaxPool."""
    if setting(node, module, "return_indices", 6, False):
        return with_indices(node, module)
    dilation = pair(setting(node, module, "dilation", 4, 1))
    ceil_mode = bool(setting(node, module, "ceil_mode", 5, False))
    return Op(ir.MaxPool, _window(node, module) | {"dilation": dilation, "ceil_mode": ceil_mode})


def with_indices(node: fx.Node, module: nn.Module | None) -> Op:
    """No pool that answers where its maxima were."""
    raise ModelError(
        f"{describe(node)}: return_indices=True has no form here; leave it out, and take what the "
        "pool gives itself instead of the first of two"
    )


def average_pool(node: fx.Node, module: nn.Module | None) -> Op:
    """AveragePool."""
    if setting(node, module, "divisor_override", 6, None) is not None:
        raise ModelError(f"{describe(node)}: divisor_override has no ONNX operator")
    flags = {
        "ceil_mode": bool(setting(node, module, "ceil_mode", 4, False)),
        "count_include_pad": bool(setting(node, module, "count_include_pad", 5, True)),
    }
    return Op(ir.AveragePool, _window(node, module) | flags)


def adaptive_max_pool(node: fx.Node, module: nn.Module | None) -> Op:
    """MaxPool, or nothing."""
    if setting(node, module, "return_indices", 2, False):
        return with_indices(node, module)
    window = _adaptive_window(node, module)
    if window is None:
        return Op(Identity)
    fixed = {"padding": (0, 0, 0, 0), "ceil_mode": False, "dilation": (1, 1)}
    return Op(ir.MaxPool, {"kernel": window, "stride": window} | fixed)


def adaptive_pool(node: fx.Node, module: nn.Module | None) -> Op:
    """AveragePool, or nothing."""
    window = _adaptive_window(node, module)
    if window is None:
        return Op(Identity)
    if window == shape(node.all_input_nodes[0])[2:]:
        return Op(ir.GlobalAveragePool)
    fixed = {"padding": (0, 0, 0, 0), "ceil_mode": False, "count_include_pad": True}
    return Op(ir.AveragePool, {"kernel": window, "stride": window} | fixed)


def _adaptive_window(node: fx.Node, module: nn.Module | None) -> tuple[int, int] | None:
    """Fixed windows, which adaptive pools have once the input's size is known, if it divides.

    None is a pool that changes nothing.
    """
    size = setting(node, module, "output_size", 1, None)
    height, width = (int(extent or 0) for extent in shape(node.all_input_nodes[0])[2:])
    first, second = size if isinstance(size, (tuple, list)) else (size, size)
    rows, columns = first or height, second or width
    if (rows, columns) == (height, width):
        return None
    if height % rows or width % columns:
        raise ModelError(
            f"{describe(node)}: an adaptive pool from {height}×{width} to {rows}×{columns} has "
            "windows of different sizes; choose an input size that divides"
        )
    return height // rows, width // columns

"""How a convolution's windows lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from sqakd_deploy.graph import Shape


def conv_geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups as :class:`sqakd_deploy.graph.Conv` has them."""
    if conv.padding == "valid":
        pads = (0, 0, 0, 0)
    elif conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = (total[0] // 2, total[1] // 2, -(-total[0] // 2), -(-total[1] // 2))
    else:
        rows, columns = (int(amount) for amount in conv.padding)
        pads = (rows, columns, rows, columns)
    return {
        "stride": tuple(conv.stride),
        "padding": pads,
        "dilation": tuple(conv.dilation),
        "groups": conv.groups,
    }


def conv_arguments(conv: nn.Conv2d | nn.ConvTranspose2d) -> dict[str, Any]:
    """What makes another layer of the same sizes, by the names of PyTorch's and Brevitas' own."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    sizes = {name: getattr(conv, name) for name in (*names, "groups")}
    return {**sizes, "bias": conv.bias is not None}


def sliced(dims: Shape, cut: Mapping[str, Any]) -> Shape:
    """Shape of a slice, from the attributes of :class:`sqakd_deploy.graph.Slice`."""
    found = list(dims)
    for axis, *bounds in zip(
        *(cut[key] for key in ("axes", "starts", "ends", "steps")), strict=True
    ):
        found[axis] = len(range(int(dims[axis] or 0))[slice(*bounds)])
    return tuple(found)


def reduced(dims: Shape, axes: Collection[int]) -> Shape:
    """Shape of a reduction, whose axes stay with size 1."""
    return tuple(1 if axis in axes else extent for axis, extent in enumerate(dims))

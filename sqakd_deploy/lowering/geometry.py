"""How a convolution's windows lie."""

from __future__ import annotations

from typing import Any

from torch import nn


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

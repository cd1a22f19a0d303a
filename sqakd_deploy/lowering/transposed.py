"""Transposed convolutions as layers to train; ``lowering/subpixel.py`` has their integer form."""

from __future__ import annotations

from brevitas.nn import QuantConv2d
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from sqakd_deploy.lowering.geometry import conv_arguments


def as_convolution(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight ``(I, O/g, kH, kW)`` as ``(O, I/g, kH, kW)``.

    Its own inverse: channels of a group change places.
    """
    first, second, *kernel = weight.shape
    by_group = weight.reshape(groups, first // groups, second, *kernel)
    return by_group.transpose(1, 2).reshape(groups * second, first // groups, *kernel)


class QuantTransposed2d(QuantConv2d):
    """A transposed convolution with its weight held as ``(O, I/g, kH, kW)``.

    Output channels are then on axis 0, as in every other layer: one scale for each, BatchNorm
    folded into it.

    Args:
        old: the float layer, for its sizes.
        weight_quant: a Brevitas injector.
    """

    def __init__(self, old: nn.ConvTranspose2d, weight_quant: type) -> None:
        super().__init__(**conv_arguments(old), weight_quant=weight_quant)
        self.output_padding = old.output_padding

    def inner_forward_impl(
        self, x: Tensor, quant_weight: Tensor, quant_bias: Tensor | None
    ) -> Tensor:
        """What Brevitas calls with the quantised weight; ``x`` is ``(N, I, H, W)``."""
        return conv_transpose2d(
            x,
            as_convolution(quant_weight, self.groups),
            quant_bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

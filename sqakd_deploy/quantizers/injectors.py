"""Brevitas injectors: hand them to any ``brevitas.nn`` layer as ``weight_quant``/``input_quant``.

::

    from brevitas.nn import QuantConv2d
    layer = QuantConv2d(
        3, 16, 3,
        weight_quant=weight_quant("lsq", bits=4),
        input_quant=act_quant("lsq", bits=4, signed=True),
    )
"""

from __future__ import annotations

from brevitas.inject import ExtendedInjector, value
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from sqakd_deploy.quantizers.base import check_bits
from sqakd_deploy.quantizers.methods import METHODS


class _WeightQuant(ExtendedInjector):
    proxy_class = WeightQuantProxyFromInjector
    signed = True
    narrow_range = False

    @value
    def weight(tracked_parameter_list: list[Tensor]) -> Tensor:  # noqa: N805 - an injector's rule
        return tracked_parameter_list[0]


class _UnsignedCodes(ActQuantProxyFromInjector):
    """Codes are 0 … 2^b − 1 whatever the sign of the tensor: the zero-point moves them."""

    def __init__(self, quant_layer: nn.Module, quant_injector: ExtendedInjector) -> None:
        super().__init__(quant_layer, quant_injector)
        self.is_signed = False


class _ActQuant(ExtendedInjector):
    proxy_class = _UnsignedCodes
    act_impl = None
    limit = None
    symmetric = False


def weight_quant(
    method: str = "lsq", bits: int = 4, per_channel: bool = False
) -> type[ExtendedInjector]:
    """An injector for ``weight_quant=``.

    Args:
        method: a registered method.
        bits: 1 to 8.
        per_channel: one scale per output channel instead of one per tensor.

    Raises:
        SpecError: if the method is unknown or the bits are out of range.
    """
    injector: type[ExtendedInjector] = _WeightQuant.let(
        tensor_quant=METHODS[method].weight, bits=check_bits(bits), per_channel=per_channel
    )
    return injector


def act_quant(
    method: str = "lsq",
    bits: int = 4,
    signed: bool = False,
    limit: float | None = None,
    symmetric: bool = False,
) -> type[ExtendedInjector]:
    """An injector for ``input_quant=``, ``act_quant=`` or ``output_quant=``.

    Args:
        method: a registered method.
        bits: 1 to 8.
        signed: the tensor takes negative values; False after a ReLU.
        limit: the range never exceeds it.
        symmetric: codes fit int8 around zero-point 0, for runtimes that know nothing else.

    Raises:
        SpecError: if the method is unknown or the bits are out of range.
    """
    injector: type[ExtendedInjector] = _ActQuant.let(
        tensor_quant=METHODS[method].activation,
        bits=check_bits(bits),
        signed=signed,
        limit=limit,
        symmetric=symmetric,
    )
    return injector

"""The published quantization functions by name."""

from __future__ import annotations

from dataclasses import dataclass

from sqakd_deploy.quantizers.base import ActivationQuantizer, WeightQuantizer
from sqakd_deploy.quantizers.dorefa import DorefaActivation, DorefaWeight
from sqakd_deploy.quantizers.ewgs import EwgsActivation, EwgsWeight
from sqakd_deploy.quantizers.lsq import LsqActivation, LsqWeight
from sqakd_deploy.quantizers.pact import PactActivation, PactWeight
from sqakd_deploy.quantizers.ste import SteActivation, SteWeight
from sqakd_deploy.registry import Registry


@dataclass(frozen=True)
class Method:
    """A quantization method.

    Attributes:
        weight: its weight quantizer.
        activation: its activation quantizer.
        summary: one line for ``sqakd-deploy list``.
        scales_gradient: it uses δ, the scaling by the discretisation error.
    """

    weight: type[WeightQuantizer]
    activation: type[ActivationQuantizer]
    summary: str
    scales_gradient: bool = False


METHODS: Registry[Method] = Registry("method")
METHODS.register(
    "ste", Method(SteWeight, SteActivation, "fixed ranges, straight-through (Bengio et al. 2013)")
)
METHODS.register(
    "pact",
    Method(PactWeight, PactActivation, "learned clipping, DoReFa weights (Choi et al. 2018)"),
)
METHODS.register("lsq", Method(LsqWeight, LsqActivation, "learned step size (Esser et al. 2020)"))
METHODS.register(
    "dorefa",
    Method(DorefaWeight, DorefaActivation, "tanh weights, fixed ranges (Zhou et al. 2016)"),
)
METHODS.register(
    "ewgs",
    Method(
        EwgsWeight,
        EwgsActivation,
        "learned bounds, gradients scaled by the discretisation error (Lee et al. 2021)",
        scales_gradient=True,
    ),
)

"""LSQ: learned step size (Esser et al., 2020), with LSQ+'s zero-point (Bhalgat et al., 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sqakd_deploy.quantizers.base import ActivationQuantizer, WeightQuantizer
from sqakd_deploy.quantizers.unified import MIN_STEP, at_most, positive, scale_gradient


class LsqWeight(WeightQuantizer):
    """``s·round(clip(w/s, Q_n, Q_p))`` with s learned.

    ∂ŵ/∂s is ``round(w/s) − w/s`` inside the range and Q_n or Q_p beyond (LSQ eq. 3; a weight on a
    bound counts as inside, as in SQAKD §3.1), times ``1/√(N·Q_p)`` with N the weights that share s
    (LSQ §2.2). At 1 bit the levels are ±s/2.
    """

    step: nn.Parameter

    def build(self) -> None:
        self.step = nn.Parameter(torch.ones(self.parameter_shape))

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        self.step.copy_(self.search(weight))

    def operands(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shared = weight.numel() / self.step.numel()
        factor = 1.0 / math.sqrt(shared * max(1, self.rule.steps // 2))
        step = positive(scale_gradient(self.step, factor))
        return weight, step, step


class LsqActivation(ActivationQuantizer):
    """``s·(round(clip(x/s, −z, n − z)))`` with s and, where signed, z learned.

    ∂x̂/∂s as for weights; ∂x̂/∂z is −s outside the range and 0 inside (LSQ+ eq. 6). Both are scaled
    by ``1/√(N·Q_p)``, N the features of one sample and Q_p the highest code (counted from zero
    where the zero-point is fixed, as in LSQ).
    """

    range_names = ("step",)
    step: nn.Parameter
    zero_point: nn.Parameter

    def build(self) -> None:
        self.step = nn.Parameter(torch.tensor(1.0))
        if self.learns_zero:
            self.zero_point = nn.Parameter(torch.tensor(0.0))

    @torch.no_grad()
    def set_range(self, x: Tensor, weight: float) -> None:
        lower, upper = self.search(x)
        step = ((upper - lower) / self.steps).clamp(min=MIN_STEP)
        self.step.lerp_(step, weight)
        if self.learns_zero:
            self.zero_point.lerp_(-lower / step, weight)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        highest = self.steps if self.learns_zero else self.top
        factor = 1.0 / math.sqrt(x[0].numel() * highest)
        step = positive(scale_gradient(self.step, factor))
        if self.limit is not None:
            step = at_most(step, self.limit / self.steps)
        if not self.learns_zero:
            return step, self.zero_like(step), step
        return step, scale_gradient(self.zero_point, factor), step

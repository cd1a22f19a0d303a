"""Plain straight-through estimator (Bengio et al., 2013) on a range that stays as calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

from sqakd_deploy.quantizers.base import ActivationQuantizer, WeightQuantizer


class SteWeight(WeightQuantizer):
    """Uniform weights with a fixed step; ∂L/∂w is passed inside the range, zero outside."""

    step: Tensor

    def build(self) -> None:
        self.register_buffer("step", torch.ones(self.parameter_shape))

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        self.step.copy_(self.search(weight))

    def operands(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weight, self.step, self.step


class SteActivation(ActivationQuantizer):
    """Uniform activations with fixed bounds l and u."""

    range_names = ("lower", "upper")
    lower: Tensor
    upper: Tensor

    def build(self) -> None:
        self.register_buffer("lower", torch.tensor(0.0))
        self.register_buffer("upper", torch.tensor(1.0))

    @torch.no_grad()
    def set_range(self, x: Tensor, weight: float) -> None:
        lower, upper = self.search(x)
        self.lower.lerp_(lower, weight)
        self.upper.lerp_(upper, weight)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step = (self.upper - self.lower) / self.steps
        return step, -self.lower / step, step

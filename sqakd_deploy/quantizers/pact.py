"""PACT: parameterised clipping of activations (Choi et al., 2018), with DoReFa's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqakd_deploy.quantizers.base import ActivationQuantizer
from sqakd_deploy.quantizers.dorefa import DorefaWeight
from sqakd_deploy.quantizers.unified import Residual, at_most, positive


class PactWeight(DorefaWeight):
    """PACT leaves weights to DoReFa (PACT §5)."""


class PactActivation(ActivationQuantizer):
    """``α·round(n·clip(x/α, 0, 1))/n``; ∂x̂/∂α is 1 for x > α and 0 below (PACT eq. 3;
    x = α counts as inside, as in SQAKD §3.1).

    Signed inputs get a lower bound that learns in the same way; around a fixed zero-point it is α's
    mirror image, ``−α·z/top``. α decays like a weight (PACT §3.2).
    """

    range_names = ("alpha", "lower")
    rule_options = {"residual": Residual.SKIP}  # noqa: RUF012
    decayed = ("alpha",)
    lower: nn.Parameter
    alpha: nn.Parameter

    def build(self) -> None:
        self.alpha = nn.Parameter(torch.tensor(1.0))
        if self.learns_zero:
            self.lower = nn.Parameter(torch.tensor(0.0))

    @torch.no_grad()
    def set_range(self, x: Tensor, weight: float) -> None:
        lower, upper = self.search(x)
        self.alpha.lerp_(upper, weight)
        if self.learns_zero:
            self.lower.lerp_(lower, weight)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.learns_zero:
            step = positive((self.alpha - self.lower) / self.steps)
        else:
            step = positive(self.alpha / self.top)
        if self.limit is not None:
            step = at_most(step, self.limit / self.steps)
        zero = -self.lower / step if self.learns_zero else self.zero_like(step)
        return step, zero, step

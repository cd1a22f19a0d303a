"""EWGS: element-wise gradient scaling (Lee, Kim & Ham, 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqakd_deploy.quantizers.base import ActivationQuantizer, WeightQuantizer
from sqakd_deploy.quantizers.unified import MIN_STEP, at_most, positive


class EwgsWeight(WeightQuantizer):
    """``s_o·(2·x_q − 1)`` with the bounds l and u and the output scale s_o learned apart.

    The bounds get a gradient from unclipped weights only (EWGS §3.2); ∂L/∂x_q is scaled by
    ``1 + δ·sign(g)·(x_c − x_q)`` (eq. 5). The published s_o multiplies the convolution's output;
    multiplying its weights instead is the same number.
    """

    mid_rise = True
    lower: nn.Parameter
    upper: nn.Parameter
    output_scale: nn.Parameter

    def build(self) -> None:
        self.lower = nn.Parameter(-torch.ones(self.parameter_shape))
        self.upper = nn.Parameter(torch.ones(self.parameter_shape))
        self.output_scale = nn.Parameter(torch.ones(self.parameter_shape))

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        half = self.search(weight) * (self.rule.steps / 2)
        self.lower.copy_(-half)
        self.upper.copy_(half)
        self.output_scale.copy_(half)

    def operands(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step = positive((self.upper - self.lower) / self.rule.steps)
        out_step = positive(self.output_scale * (2 / self.rule.steps))
        return weight.float() - (self.upper + self.lower) / 2, step, out_step


class EwgsActivation(ActivationQuantizer):
    """``x_q`` of the learned bounds l and u, on an output range that stays as calibrated.

    Published activations are left in [0, 1], and one s_o per convolution scales the product; here
    the weights' s_o carries what is learned and a constant keeps the tensor in real units, so that
    residual sums mean the same as in the teacher. Input and output steps therefore drift apart in
    training, and the export writes both.

    Departure for signed inputs: the zero-point is the integer next to ``−l/step``, because a level
    that stands for zero is what makes padding exact. Moving it changes clipped elements only, which
    give the bounds no gradient here, so l and u learn through the step. Around a fixed zero-point u
    is learned, and l is its mirror image.
    """

    range_names = ("lower", "upper")
    lower: nn.Parameter
    upper: nn.Parameter
    out_step: Tensor

    def build(self) -> None:
        self.upper = nn.Parameter(torch.tensor(1.0))
        if self.learns_zero:
            self.lower = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("out_step", torch.tensor(1.0))

    @torch.no_grad()
    def set_range(self, x: Tensor, weight: float) -> None:
        lower, upper = self.search(x)
        self.upper.lerp_(upper, weight)
        if self.learns_zero:
            self.lower.lerp_(lower, weight)
        self.out_step.copy_(self._step().clamp(min=MIN_STEP))

    def _step(self) -> Tensor:
        if self.learns_zero:
            step = positive((self.upper - self.lower) / self.steps)
        else:
            step = positive(self.upper / self.top)
        return step if self.limit is None else at_most(step, self.limit / self.steps)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step = self._step()
        zero = -self.lower / step if self.learns_zero else self.zero_like(step)
        return step, zero.detach(), self.out_step

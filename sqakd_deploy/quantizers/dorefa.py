"""DoReFa-Net (Zhou et al., 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from sqakd_deploy.quantizers.base import WeightQuantizer
from sqakd_deploy.quantizers.ste import SteActivation
from sqakd_deploy.quantizers.unified import MIN_STEP


class DorefaWeight(WeightQuantizer):
    """``2·round(n·(tanh w/(2·max|tanh w|) + ½))/n − 1`` (DoReFa eq. 9), on a fixed output range.

    The maximum is taken anew at every step and not differentiated through, so
    ∂ŵ/∂w = gain·(1 − tanh²w)/max|tanh w|. At 1 bit the weights are ``sign(w)·mean|w|`` and the
    gradient passes unchanged (DoReFa eq. 7).

    Departure: the published levels fill [−1, 1] whatever the weights' magnitude, and leave it to
    BatchNorm to undo that. Here a ``gain``, set once so that the levels fit the weights, takes its
    place: a student may start from its teacher, and a layer without BatchNorm keeps its scale.
    """

    mid_rise = True
    gain: Tensor

    def __init__(self, weight: Tensor, bits: int, per_channel: bool = False) -> None:
        if bits == 1:
            self.rule_options = {"clip_gradient": False}
        super().__init__(weight, bits, per_channel)

    def build(self) -> None:
        self.register_buffer("gain", torch.ones(self.parameter_shape))

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        if self.bits == 1:
            return  # the scale is mean|w| itself
        self.gain.fill_(1.0)
        levels = self.rows(self.forward(weight)[0])
        fit = (levels * self.rows(weight)).sum(1) / (levels**2).sum(1).clamp(min=MIN_STEP)
        self.gain.copy_(self.shaped(fit.clamp(min=MIN_STEP)))

    def operands(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.bits == 1:
            mean = self.shaped(self.rows(weight).abs().mean(dim=1))
            step = (2 * mean).clamp(min=MIN_STEP)
            return weight, step, step
        squashed = torch.tanh(weight.float())
        largest = self.shaped(self.rows(squashed).abs().amax(dim=1)).clamp(min=MIN_STEP)
        step = torch.full_like(self.gain, 2 / self.rule.steps)
        return squashed / largest, step, self.gain * step


class DorefaActivation(SteActivation):
    """``round(n·clip(x/r, 0, 1))/n·r`` (DoReFa eq. 11) with nothing learned.

    Departure: published networks are trained from scratch with r = 1; a student that starts from
    a trained teacher needs the teacher's range, so r is calibrated, then frozen.
    """

r"""The one quantization function that every method of this package is an instance of.

Forward (SQAKD, Zhao & Zhao, 2023, §3.1: clip, discretise, rescale), written in units of the step
so that the runtime's ``QuantizeLinear`` repeats it operation by operation::

    t = x / step                      position on the grid, in steps
    c = clip(t, low, high)            low and high are grid points
    r = round(c + offset) − offset    half to even; offset 0 (a grid with zero) or n/2 (without)
    y = out_step · r

With l = low·step, u = high·step and n = high − low this is the paper's
``x_c = clip((x − l)/(u − l), 0, 1)``, ``x_q = round(n·x_c)/n`` followed by its affine rescaling.

Backward (SQAKD §3.2): the straight-through estimator plus the discretisation error::

    ∂L/∂x_c = g + μ·(x_c − x_q),   μ = δ·|g|

δ = 0 is the plain straight-through estimator, δ > 0 is EWGS (Lee et al., 2021, eq. 5). Everything
else that tells the methods apart is which of ``step``, ``low``, ``high`` and ``out_step`` are
learned and whether they are tied, and :class:`Residual`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Residual(Enum):
    """What the gradient of ``out_step`` sees of the rounding.

    KEEP uses the rounded position (the true derivative; LSQ). SKIP uses the unrounded one, as if
    rounding were the identity (PACT: only clipped elements then move the range).
    """

    KEEP = "keep"
    SKIP = "skip"


@dataclass(frozen=True)
class Rule:
    """The constants of a quantizer.

    Attributes:
        steps: n, steps between the lowest and the highest level.
        offset: 0 for grids that hold zero (mid-tread), n/2 for those that do not (mid-rise).
        residual: see :class:`Residual`.
        clip_gradient: zero the input's gradient outside ``[low, high]``; False passes it all.
    """

    steps: float
    offset: float = 0.0
    residual: Residual = Residual.KEEP
    clip_gradient: bool = True


def discretise(position: Tensor, low: Tensor, high: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Clipped and rounded positions, in steps.

    Args:
        position: ``x / step``, any shape.
        low: lowest level, broadcastable.
        high: highest level, broadcastable.
        offset: of the rounding, in steps.

    Returns:
        The clipped position and the level next to it.
    """
    clipped = torch.clamp(position, low, high)
    if offset == 0.0:
        return clipped, torch.round(clipped)
    return clipped, torch.round(clipped + offset) - offset


class _Unified(torch.autograd.Function):
    """Saves only the input; positions and masks are cheaper to compute again than to keep.

    ``out_step`` None ties it to ``step``: one tensor must not come in twice, and the two gradients
    then take one reduction instead of two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        low: Tensor,
        high: Tensor,
        out_step: Tensor | None,
        delta: Tensor,
        steps: float,
        offset: float,
        keep_residual: bool,
        clip_gradient: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, step, low, high, out_step, delta)
        ctx.steps, ctx.offset = steps, offset
        ctx.keep_residual, ctx.clip_gradient = keep_residual, clip_gradient
        _, level = discretise(x.float() / step, low, high, offset)
        return (level * (step if out_step is None else out_step)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, step, low, high, out_step, delta = ctx.saved_tensors
        need_x, need_step, need_low, need_high, need_out = ctx.needs_input_grad[:5]
        grad = grads[0].float()
        position = x.float() / step
        clipped, level = discretise(position, low, high, ctx.offset)
        error = (clipped - level).detach() / ctx.steps  # x_c − x_q, on the paper's [0, 1]
        through = grad * (step if out_step is None else out_step)
        through = through + delta * through.abs() * error
        below, above = position < low, position > high
        inside = through.masked_fill(below | above, 0.0)
        grad_x = (inside if ctx.clip_gradient else through) / step if need_x else None
        seen = grad * (level if ctx.keep_residual else clipped)
        grad_step = -inside * position / step if need_step else None
        if grad_step is not None and out_step is None:
            grad_step = grad_step + seen
        return (
            grad_x.to(x.dtype) if grad_x is not None else None,
            grad_step.sum_to_size(step.shape) if grad_step is not None else None,
            (through * below).sum_to_size(low.shape) if need_low else None,
            (through * above).sum_to_size(high.shape) if need_high else None,
            seen.sum_to_size(out_step.shape) if need_out and out_step is not None else None,
            *(None,) * 5,
        )


def unified_quantize(
    x: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    out_step: Tensor,
    delta: Tensor,
    rule: Rule,
) -> Tensor:
    """Quantise ``x``; see the module's docstring for the equations.

    Args:
        x: any shape and floating type; computed in float32, returned in its own type.
        step: positive float32, ``()`` or broadcastable along the output channels.
        low: lowest level in steps, shaped like ``step`` or ``()``.
        high: highest level in steps, likewise.
        out_step: distance between neighbouring outputs; the same tensor as ``step`` where input
            and output ranges are tied.
        delta: δ ≥ 0, ``()``.
        rule: the constants.

    Returns:
        ``out_step`` times whole (mid-tread) or half-odd (mid-rise) numbers, shaped like ``x``.
    """
    own = None if out_step is step else out_step
    # torch.compile traces plain numbers through a Function, but no objects of ours
    constants = (rule.steps, rule.offset, rule.residual is Residual.KEEP, rule.clip_gradient)
    result: Tensor = _Unified.apply(x, step, low, high, own, delta, *constants)
    return result


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` unchanged to the last bit; its gradient times ``factor``."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result


class _Replace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


MIN_STEP = 1e-6
"""Smallest step. Keeps ``u − l ≥ ε`` whatever training does to the bounds."""


def positive(x: Tensor, minimum: float = MIN_STEP) -> Tensor:
    """``max(|x|, minimum)`` with gradient ±1 everywhere, so that no value is a trap."""
    magnitude = torch.where(x < 0, -x, x)
    return _replace(magnitude, magnitude.clamp(min=minimum))


def round_through(x: Tensor, low: float, high: float) -> Tensor:
    """Nearest integer in ``[low, high]``; gradient 1."""
    return _replace(x, torch.round(x).clamp(low, high))


def at_most(x: Tensor, limit: float) -> Tensor:
    """``min(x, limit)`` with gradient 1."""
    return _replace(x, x.clamp(max=limit))


def _replace(x: Tensor, value: Tensor) -> Tensor:
    """``value`` going forward, exactly; the identity on ``x`` going backward."""
    result: Tensor = _Replace.apply(x, value)
    return result

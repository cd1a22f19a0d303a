"""Initial ranges: the clipping that quantises the data seen with the smallest squared error.

The published methods start from closed forms (LSQ: 2·mean|x|/√Q_p; EWGS: three standard
deviations; PACT: 6). Those assume a distribution and a bit-width; searching a few candidates on
the data itself assumes neither, and one rule serves every method from 1 to 8 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sqakd_deploy.quantizers.unified import MIN_STEP, discretise

_CANDIDATES = 64
_SAMPLE = 1 << 16
_WEIGHTS = 1 << 18  # of a row; more cost minutes in VGG's classifier and change no candidate
_AT_ONCE = 1 << 17  # numbers that candidates are compared on at a time; more leave the CPU's cache


def thin_out(x: Tensor, limit: int = _SAMPLE) -> Tensor:
    """At most ``limit`` elements of ``x``, evenly spaced; flat.

    The spacing shares no factor with what the first axis counts, one image: else the elements of
    all images would lie in the same columns, at the border.
    """
    spacing = max(1, -(-x.numel() // limit))
    while math.gcd(spacing, math.prod(x.shape[1:])) > 1:
        spacing += 1
    return x.reshape(-1)[::spacing]


def thin_out_rows(rows: Tensor, limit: int = _WEIGHTS) -> Tensor:
    """At most ``limit`` columns of ``(C, K)``, evenly spaced over channels and places of a kernel.

    The spacing shares no factor with the sizes of kernels and channels that networks have.
    """
    spacing = -(-rows.shape[1] // limit)
    while spacing > 1 and math.gcd(spacing, 2 * 3 * 5 * 7) > 1:
        spacing += 1
    return rows[:, ::spacing]


def _fractions(device: torch.device) -> Tensor:
    """Fractions of the full range to try, in ascending order, 1 included."""
    return torch.linspace(1.0 / _CANDIDATES, 1.0, _CANDIDATES, device=device)


def _best(rows: Tensor, steps: Tensor, low: Tensor, high: Tensor, offset: float = 0.0) -> Tensor:
    """Which of some steps costs each row the least squared error.

    Args:
        rows: what is quantised, ``(C, K)``.
        steps: the candidates of each row, ``(S, C)``.
        low: lowest level of each candidate, in steps, ``(S,)`` or one for all.
        high: highest level, likewise.
        offset: of the rounding, in steps.

    Returns:
        Indices of candidates ``(C,)``.
    """
    part = max(1, _AT_ONCE // max(1, rows.numel()))
    bounds = (bound.expand(len(steps)).split(part) for bound in (low, high))
    errors = []
    for some, lowest, highest in zip(steps.split(part), *bounds, strict=True):
        step, ends = some[:, :, None], (lowest[:, None, None], highest[:, None, None])
        _, level = discretise(rows / step, *ends, offset)
        errors.append(level.mul_(step).sub_(rows).square_().mean(dim=2))
    return torch.cat(errors).argmin(dim=0)


def search_range(x: Tensor, bits: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The range ``[l, u]`` with ``l ≤ 0 ≤ u`` that costs the least squared error.

    Args:
        x: activations, any shape.
        bits: bit-width.
        signed: False pins ``l`` to 0.

    Returns:
        Scalars l and u; ``(−1, 1)`` or ``(0, 1)`` where ``x`` is all zero, since any range does.
    """
    sample = thin_out(x.detach().float())
    steps = 2**bits - 1
    high = sample.max().clamp(min=0)
    low = sample.min().clamp(max=0) if signed else torch.zeros_like(high)
    if high - low < MIN_STEP:
        return torch.ones_like(high) * (-1.0 if signed else 0.0), torch.ones_like(high)
    fractions = _fractions(x.device)
    step = (high - low) * fractions / steps
    zero = torch.round(-low * fractions / step).clamp(0, steps)
    (best,) = _best(sample[None], step[:, None], -zero, steps - zero)
    return low * fractions[best], high * fractions[best]


def search_around_zero(x: Tensor, low: int, high: int) -> Tensor:
    """The step that costs the least squared error on the codes ``low … high``, 0 among them.

    Args:
        x: activations, any shape.
        low: lowest code, at most 0.
        high: highest code, at least 1.

    Returns:
        A scalar; 1 over the number of codes above zero where there is nothing to fit.
    """
    sample = thin_out(x.detach().float())
    full = sample.max().clamp(min=0) / high
    if low < 0:
        full = torch.maximum(full, sample.min().clamp(max=0) / low)
    if full < MIN_STEP:
        return torch.ones_like(full) / high
    steps = full * _fractions(x.device)
    bounds = sample.new_tensor(float(low)), sample.new_tensor(float(high))
    (best,) = _best(sample[None], steps[:, None], *bounds)
    return steps[best]


def search_step(w: Tensor, low: float, high: float, offset: float) -> Tensor:
    """The step per row that costs the least squared error on a fixed set of levels.

    Args:
        w: weights ``(C, K)``; one row for a single scale. Of long rows a sample decides.
        low: lowest level, in steps.
        high: highest level, in steps.
        offset: of the rounding (see :class:`~sqakd_deploy.quantizers.unified.Rule`).

    Returns:
        Steps ``(C,)``; for an all-zero row 1, or the smallest step on a grid without zero.
    """
    rows = w.detach().float()
    if low == -high and high - low == 1:
        # Two levels ±s/2: the error is least where s/2 is the mean of |w| (Rastegari et al., 2016).
        return (2 * rows.abs().mean(dim=1)).clamp(min=MIN_STEP)
    # Nothing is cut off at the full step, on either side: there may be a level more on one.
    full = torch.maximum(rows.amax(dim=1) / high, rows.amin(dim=1) / low).clamp(min=0)
    steps = (full * _fractions(w.device)[:, None]).clamp(min=MIN_STEP)
    bounds, some = (rows.new_tensor(low), rows.new_tensor(high)), thin_out_rows(rows).contiguous()
    best = steps.gather(0, _best(some, steps, *bounds, offset)[None])[0]
    # Where there is nothing to fit: any step will do on a grid with zero; without one, the smallest
    # levels are the nearest. A dead filter must not become a large one.
    silent = 1.0 if offset == 0.0 else MIN_STEP
    least = MIN_STEP / max(abs(low), abs(high))
    return torch.where(full < least, torch.full_like(best, silent), best)

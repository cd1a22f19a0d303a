"""Closed forms of the published quantizers in float64, each written from its paper.

They share neither code nor formulation with the package. Everything here is in the papers' own
terms: a range ``[l, u]`` normalised to ``[0, 1]``, n steps in it, and an affine map to the output
(SQAKD, Zhao & Zhao, 2023, §3.1)::

    x_c = clip((x − l)/(u − l), 0, 1)      x_q = round(n·x_c)/n      x̂ = A·x_q + B

and, going back (SQAKD §3.2), with g_q = ∂L/∂x_q::

    ∂L/∂x_c = g_q + μ·(x_c − x_q),   μ = δ·|g_q|

Conventions that the papers leave open or disagree on:

- An input that lies on a bound is inside the range (SQAKD §3.1). PACT eq. 3 and LSQ eq. 3 count it
  as clipped; that differs on these points only.
- Ties go to the even *code*; where codes are signed this is another level than the even ``n·x_c``.
- Zero is a level of every activation grid: the zero-point z is the integer nearest ``−l·n/(u − l)``
  in ``[0, n]``. What that rounding moved, r, is held fixed when a gradient is taken.
- Bounds that have crossed are swapped, and a range below n·ε is widened to it; the gradient is the
  one without the widening.

Around a fixed zero-point (``around``) the range is ``[−z·s, (n − z)·s]`` and one number is learned:
the step, or the upper end, whose mirror image the lower end is.

Gradients of parameters are given per element: ∂L/∂p is their sum over the elements that share p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Parameters: TypeAlias = Mapping[str, float]

EPSILON = 1e-6
"""Smallest step: ``u − l ≥ n·ε`` by construction (numerics contract, 3)."""


@dataclass(frozen=True)
class Reference:
    """What a quantizer must give on a tensor whose elements share all parameters.

    Attributes:
        output: x̂, shaped like the input.
        grad_input: ∂L/∂x, likewise.
        terms: ∂L/∂p by element, for each learned parameter.
        reach: the largest ``|∂x̂/∂p|`` that one element can have; errors of the sums are measured
            in it.
    """

    output: Array
    grad_input: Array
    terms: dict[str, Array] = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Normalised:
    """A tensor on ``[0, 1]``: clipped, discretised, and where it lay in the range."""

    clipped: Array
    nearest: Array
    below: NDArray[np.bool_]
    above: NDArray[np.bool_]

    @property
    def inside(self) -> NDArray[np.bool_]:
        return ~(self.below | self.above)


def normalise(x: Array, lower: float, upper: float, steps: int, first: int = 0) -> Normalised:
    """SQAKD §3.1, EWGS eq. 1–2: x_c and x_q; ``first`` is the code of the lowest level."""
    counts = np.clip((x - lower) * steps / (upper - lower), 0, steps)  # n·x_c, exact on ties
    nearest = (np.rint(counts + first) - first) / steps
    return Normalised(counts / steps, nearest, x < lower, x > upper)


def through_rounding(grad: Array, at: Normalised, delta: float) -> Array:
    """∂L/∂x_c from ∂L/∂x_q (SQAKD §3.2 with μ = δ·|g|; EWGS eq. 5)."""
    return grad * (1 + delta * np.sign(grad) * (at.clipped - at.nearest))


def sign(value: float) -> float:
    """−1 for negative values, 1 for all others."""
    return -1.0 if value < 0 else 1.0


def weight_levels(bits: int, mid_rise: bool) -> tuple[int, int | None]:
    """(n, code of the lowest level); no codes on a mid-rise grid, which has no zero."""
    if bits == 8:
        return 254, -127
    if bits == 1 or mid_rise:
        return 2**bits - 1, None
    return 2**bits - 1, -(2 ** (bits - 1))


# -- weights -------------------------------------------------------------------------------------


def ste_weight(w: Array, grad: Array, bits: int, p: Parameters, delta: float = 0.0) -> Reference:
    """Bengio et al. (2013) on a fixed uniform grid: the gradient of the identity, clipped."""
    at, lower, upper = _uniform_weight(w, bits, p["step"])
    output = lower + (upper - lower) * at.nearest
    return Reference(output, through_rounding(grad, at, delta) * at.inside)


def lsq_weight(w: Array, grad: Array, bits: int, p: Parameters, delta: float = 0.0) -> Reference:
    """LSQ eq. 1–3 and 5, with the gradient scale 1/√(N·Q_p) of §2.2 (Q_p := 1 at 1 bit)."""
    step = max(abs(p["step"]), EPSILON)
    at, lower, upper = _uniform_weight(w, bits, step)
    highest = 1 if bits == 1 else weight_levels(bits, mid_rise=False)[0] // 2
    factor = sign(p["step"]) / np.sqrt(w.size * highest)
    terms, reach = _lsq_step(w, grad, step, lower, upper, at, factor)
    output = lower + (upper - lower) * at.nearest
    grad_input = through_rounding(grad, at, delta) * at.inside
    return Reference(output, grad_input, {"step": terms}, {"step": reach})


def ewgs_weight(w: Array, grad: Array, bits: int, p: Parameters, delta: float = 0.0) -> Reference:
    """EWGS eq. 1–3 and 5 with |s_o|: x̂ = |s_o|·(2·x_q − 1).

    ∂x_c/∂l = −(1 − v)/(u − l) and ∂x_c/∂u = −v/(u − l) inside the range, zero outside, with
    v = (x − l)/(u − l).
    """
    steps, first = weight_levels(bits, mid_rise=True)
    crossed = p["upper"] < p["lower"]
    lower, upper = _apart(p["lower"], p["upper"], steps)
    scale = max(abs(p["output_scale"]), EPSILON * steps / 2)
    at = normalise(w, lower, upper, steps, first or 0)
    levels = 2 * at.nearest - 1
    width = upper - lower
    grad_clipped = through_rounding(2 * scale * grad, at, delta) * at.inside
    grad_lower = grad_clipped * -(1 - (w - lower) / width) / width
    grad_upper = grad_clipped * -((w - lower) / width) / width
    if crossed:
        grad_lower, grad_upper = grad_upper, grad_lower
    terms = {
        "lower": grad_lower,
        "upper": grad_upper,
        "output_scale": sign(p["output_scale"]) * grad * levels,
    }
    slope = 2 * scale * (1 + delta) / width
    reach = {"lower": slope, "upper": slope, "output_scale": 1.0}
    return Reference(scale * levels, grad_clipped / width, terms, reach)


def dorefa_weight(w: Array, grad: Array, bits: int, p: Parameters, delta: float = 0.0) -> Reference:
    """DoReFa eq. 7–10, times a constant ``gain``.

    k bits: 2·quantize_k(tanh w/(2·max|tanh w|) + ½) − 1 and its chain (1 − tanh²w)/max|tanh w|;
    1 bit: sign(w)·mean|w|, whose gradient is passed on unchanged. sign(0) is −1: a tie goes to the
    even one of the codes 0 and 1.
    """
    if bits == 1:
        mean = max(float(np.abs(w).mean()), EPSILON / 2)
        return Reference(np.where(w > 0, mean, -mean), grad.copy())
    steps, first = weight_levels(bits, mid_rise=True)
    squashed = np.tanh(w)
    largest = max(float(np.abs(squashed).max()), EPSILON)
    at = normalise(squashed / (2 * largest) + 0.5, 0.0, 1.0, steps, first or 0)
    slope = 2 * p["gain"] * (1 - squashed**2) / (2 * largest)
    return Reference(p["gain"] * (2 * at.nearest - 1), through_rounding(grad, at, delta) * slope)


def _uniform_weight(w: Array, bits: int, step: float) -> tuple[Normalised, float, float]:
    steps, first = weight_levels(bits, mid_rise=False)
    lower = -step * steps / 2 if first is None else step * first
    upper = lower + step * steps
    return normalise(w, lower, upper, steps, first or 0), lower, upper


def _lsq_step(
    x: Array, grad: Array, step: float, lower: float, upper: float, at: Normalised, factor: float
) -> tuple[Array, float]:
    """LSQ eq. 3: round(x/s) − x/s inside; the lowest or the highest level outside."""
    rounded = (lower + (upper - lower) * at.nearest) / step
    slope = np.where(at.inside, rounded - x / step, rounded)
    return grad * slope * factor, abs(factor) * max(abs(lower), abs(upper)) / step


def _apart(lower: float, upper: float, steps: int) -> tuple[float, float]:
    """In order, and n·ε apart at least, about the same centre."""
    lower, upper = min(lower, upper), max(lower, upper)
    missing = max(0.0, EPSILON * steps - (upper - lower)) / 2
    return lower - missing, upper + missing


# -- activations ---------------------------------------------------------------------------------

Around: TypeAlias = tuple[int, int]
"""Steps of a symmetric grid, and which of its levels, counted from the lowest, is zero."""


def levels_around_zero(bits: int, signed: bool) -> Around:
    """int8 with zero-point 0: −2^(b−1) … 2^(b−1) − 1, or what of it is not negative and fits."""
    if not signed:
        return min(2**bits - 1, 127), 0
    return 2**bits - 1, 2 ** (bits - 1) if bits > 1 else 0


def ste_activation(
    x: Array,
    grad: Array,
    bits: int,
    p: Parameters,
    delta: float = 0.0,
    around: Around | None = None,
) -> Reference:
    """A fixed range [l, u]; also DoReFa's eq. 11 with the range in place of [0, 1]."""
    width = p["upper"] - p.get("lower", 0.0)
    if around is None:
        steps = 2**bits - 1
        zero = _zero_point(p.get("lower", 0.0), width, steps)
    else:
        steps, zero = around
    at, lower = _activation(x, width, zero, steps)
    return Reference(lower + width * at.nearest, through_rounding(grad, at, delta) * at.inside)


def lsq_activation(
    x: Array,
    grad: Array,
    bits: int,
    p: Parameters,
    delta: float = 0.0,
    around: Around | None = None,
) -> Reference:
    """LSQ eq. 1–3, with LSQ+'s zero-point: ∂x̂/∂z is −s where clipped, else 0.

    Both are scaled by 1/√(N·Q_p): N features a sample (the first axis counts samples), Q_p = n, or
    the highest level around a fixed zero.
    """
    step = max(abs(p["step"]), EPSILON)
    if around is None:
        steps = highest = 2**bits - 1
        zero = int(np.clip(np.rint(p.get("zero_point", 0.0)), 0, steps))
    else:
        steps, zero = around
        highest = steps - zero
    at, lower = _activation(x, step * steps, zero, steps)
    upper = lower + step * steps
    scale = 1 / np.sqrt(x[0].size * highest)
    terms, reach = _lsq_step(x, grad, step, lower, upper, at, sign(p["step"]) * scale)
    by_name, reaches = {"step": terms}, {"step": reach}
    if "zero_point" in p:
        by_name["zero_point"] = -grad * step * scale * ~at.inside
        reaches["zero_point"] = step * scale
    output = lower + (upper - lower) * at.nearest
    return Reference(output, through_rounding(grad, at, delta) * at.inside, by_name, reaches)


def pact_activation(
    x: Array,
    grad: Array,
    bits: int,
    p: Parameters,
    delta: float = 0.0,
    around: Around | None = None,
) -> Reference:
    """PACT eq. 1–3: ∂x̂/∂α is 1 where x is clipped from above, 0 elsewhere.

    A signed input has a lower bound too. The ends of the range are then ``l − r·s`` and
    ``u − r·s``, s = (u − l)/n, where r is what rounding moved the zero-point by. Around a fixed
    zero they are ``−α·z/(n − z)`` and α.
    """
    if around is not None:
        steps, zero = around
        mirrored = zero / (steps - zero)
        width = max(abs(p["alpha"]) / (steps - zero), EPSILON) * steps
        at, lower = _activation(x, width, zero, steps)
        alpha = sign(p["alpha"]) * (at.above * 1.0 - at.below * mirrored)
        output = lower + width * at.nearest
        grad_input = through_rounding(grad, at, delta) * at.inside
        reach = {"alpha": max(1.0, mirrored)}
        return Reference(output, grad_input, {"alpha": grad * alpha}, reach)
    steps = 2**bits - 1
    given_lower = p.get("lower", 0.0)
    direction = sign(p["alpha"] - given_lower)
    width = max(abs(p["alpha"] - given_lower), EPSILON * steps)
    zero = _zero_point(given_lower, width, steps)
    at, lower = _activation(x, width, zero, steps)
    moved = zero + given_lower * steps / width
    step_by_alpha = direction / steps
    # below: l − r·s; above: l − r·s + n·s
    alpha = (at.below * -moved + at.above * (steps - moved)) * step_by_alpha
    terms = {"alpha": grad * alpha}
    reach = {"alpha": 1 + abs(moved) / steps}
    if "lower" in p:
        terms["lower"] = grad * (~at.inside - alpha)
        reach["lower"] = 1 + reach["alpha"]
    output = lower + width * at.nearest
    return Reference(output, through_rounding(grad, at, delta) * at.inside, terms, reach)


def ewgs_activation(
    x: Array,
    grad: Array,
    bits: int,
    p: Parameters,
    delta: float = 0.0,
    around: Around | None = None,
) -> Reference:
    """EWGS eq. 1, 2, 4 and 5, mapped to a fixed output range: x̂ = n·s_out·x_q − z·s_out.

    Unsigned, l = 0: ∂x_c/∂u = −v/u as published. Signed: the integer z stands for ``−l·n/(u − l)``
    and is held fixed, so that x_c = x/(u − l) + z/n and ∂x_c/∂(u − l) = −x/(u − l)². Around a fixed
    zero u − l is u·n/(n − z).
    """
    if around is None:
        steps = 2**bits - 1
        given_lower = p.get("lower", 0.0)
        direction = sign(p["upper"] - given_lower)
        width = max(abs(p["upper"] - given_lower), EPSILON * steps)
        zero = _zero_point(given_lower, width, steps)
    else:
        steps, zero = around
        direction = sign(p["upper"]) * steps / (steps - zero)
        width = max(abs(p["upper"]) / (steps - zero), EPSILON) * steps
    at, _ = _activation(x, width, zero, steps)
    slope = p["out_step"] * steps
    grad_clipped = through_rounding(slope * grad, at, delta) * at.inside
    grad_width = grad_clipped * -x / width**2
    terms = {"upper": direction * grad_width}
    reach = {"upper": abs(direction) * slope * (1 + delta) / width}
    if "lower" in p:
        terms["lower"], reach["lower"] = -terms["upper"], reach["upper"]
    output = p["out_step"] * (steps * at.nearest - zero)
    return Reference(output, grad_clipped / width, terms, reach)


def _zero_point(lower: float, width: float, steps: int) -> int:
    return int(np.clip(np.rint(-lower * steps / width), 0, steps))


def _activation(x: Array, width: float, zero: int, steps: int) -> tuple[Normalised, float]:
    """The tensor on the range whose level number ``zero`` is 0, and that range's lower end."""
    lower = -width * zero / steps
    return normalise(x, lower, lower + width, steps, first=-zero), lower


Function: TypeAlias = Callable[..., Reference]

WEIGHT_REFERENCES: dict[str, Function] = {
    "ste": ste_weight,
    "pact": dorefa_weight,  # PACT §5 takes DoReFa's
    "lsq": lsq_weight,
    "dorefa": dorefa_weight,
    "ewgs": ewgs_weight,
}

ACTIVATION_REFERENCES: dict[str, Function] = {
    "ste": ste_activation,
    "pact": pact_activation,
    "lsq": lsq_activation,
    "dorefa": ste_activation,
    "ewgs": ewgs_activation,
}

"""The unified function and its small helpers, against numerical derivatives and the paper."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sqakd_deploy.quantizers import Residual, Rule, unified_quantize
from sqakd_deploy.quantizers.unified import (
    MIN_STEP,
    at_most,
    discretise,
    positive,
    round_through,
    scale_gradient,
)

OPERANDS = ("x", "step", "low", "high", "out_step")
# Central differences of a function that is linear or 1/step between its kinks: the error is
# (width/step)² relative, and float64 rounding over the width. What is left is float32's own.
WIDTH = 1e-5
RTOL = 1e-5

MID_TREAD = Rule(steps=7)
MID_RISE = Rule(steps=7, offset=3.5)
CENTRE = {MID_TREAD: (-4.0, 3.0), MID_RISE: (-3.5, 3.5)}
grids = pytest.mark.parametrize("rule", [MID_TREAD, MID_RISE], ids=["mid-tread", "mid-rise"])


def operands(rule: Rule, per_channel: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Inputs inside and outside the range, none within 0.05 steps of a tie or a bound."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randint(-6, 6, (3, 40), generator=generator) + 0.25
    position += torch.rand(position.shape, generator=generator) * 0.2
    shape = (3, 1) if per_channel else ()
    step = torch.rand(shape, generator=generator) + 0.5
    low, high = CENTRE[rule]
    return {
        "x": position * step,
        "step": step,
        "low": torch.tensor(low),
        "high": torch.tensor(high),
        "out_step": torch.rand(shape, generator=generator) + 0.5,
    }


def quantise(values: dict[str, Tensor], rule: Rule, delta: float = 0.0) -> Tensor:
    return unified_quantize(*(values[n] for n in OPERANDS), torch.tensor(delta), rule)


def gradients(
    values: dict[str, Tensor], rule: Rule, above: Tensor, delta: float = 0.0
) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    found = torch.autograd.grad(quantise(leaves, rule, delta), list(leaves.values()), above)
    return dict(zip(leaves, found, strict=True))


def numerical(loss: Callable[[dict[str, Tensor]], float], values: dict[str, Tensor]) -> Tensor:
    """dL/dv of each element of each operand, in float64."""
    result = []
    for name in OPERANDS:
        for i in range(values[name].numel()):
            ends = []
            for sign in (1, -1):
                moved = {n: v.clone() for n, v in values.items()}
                moved[name].view(-1)[i] += sign * WIDTH
                ends.append(loss(moved))
            result.append((ends[0] - ends[1]) / (2 * WIDTH))
    return torch.tensor(result, dtype=torch.float64)


# -- forward -------------------------------------------------------------------------------------


@grids
def test_levels_are_clipped_and_rounded(rule: Rule) -> None:
    low, high = CENTRE[rule]
    x = torch.linspace(-3, 3, 101)
    values = {"x": x, "step": torch.tensor(0.5), "out_step": torch.tensor(0.25)}
    values |= {"low": torch.tensor(low), "high": torch.tensor(high)}
    levels = np.arange(low, high + 1)
    nearest = np.abs(x.double().numpy()[:, None] / 0.5 - levels).argmin(axis=1)
    away = np.abs((x.double().numpy() / 0.5 - low) % 1 - 0.5) > 1e-3
    wanted = torch.tensor(levels[nearest] * 0.25, dtype=torch.float32)
    assert torch.equal(quantise(values, rule)[away], wanted[away])


def test_ties_go_to_the_even_level() -> None:
    x = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    zero = torch.tensor(0.0)
    _, level = discretise(x, zero - 4, zero + 3, 0.0)
    assert level.tolist() == [-4, -2, -2, 0, 0, 2, 2]
    _, level = discretise(torch.arange(-3.0, 4.0), zero - 3.5, zero + 3.5, 3.5)
    assert level.tolist() == [-3.5, -1.5, -1.5, 0.5, 0.5, 2.5, 2.5]  # even ones of 0 … 7


def test_the_results_type_is_the_inputs_and_arithmetic_is_float32() -> None:
    values = operands(MID_TREAD)
    exact = quantise(values, MID_TREAD)
    values["x"] = values["x"].bfloat16()
    low_precision = quantise(values, MID_TREAD)
    assert low_precision.dtype == torch.bfloat16
    values["x"] = values["x"].float()
    assert torch.equal(low_precision, quantise(values, MID_TREAD).bfloat16())
    assert exact.dtype == torch.float32


# -- backward ------------------------------------------------------------------------------------


@grids
@pytest.mark.parametrize("residual", Residual)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_gradients_are_those_with_the_rounding_frozen(
    rule: Rule, residual: Residual, per_channel: bool
) -> None:
    """Straight-through: round(c) = c + r with r constant, and without r where it is SKIPped."""
    rule = Rule(rule.steps, rule.offset, residual)
    values = operands(MID_RISE if rule.offset else MID_TREAD, per_channel)
    above = torch.randn(values["x"].shape)
    found = gradients(values, rule, above)
    double = {name: value.double() for name, value in values.items()}
    clipped, level = discretise(double["x"] / double["step"], double["low"], double["high"], 0.0)
    if rule.offset:
        level = torch.round(clipped + rule.offset) - rule.offset
    moved = (level - clipped) * (residual is Residual.KEEP)

    def loss(v: dict[str, Tensor]) -> float:
        position = torch.clamp(v["x"] / v["step"], v["low"], v["high"])
        return float((above.double() * v["out_step"] * (position + moved)).sum())

    wanted = numerical(loss, double)
    got = torch.cat([found[name].flatten() for name in OPERANDS]).double()
    torch.testing.assert_close(got, wanted, rtol=RTOL, atol=RTOL * float(wanted.abs().max()))


@grids
@pytest.mark.parametrize("residual", Residual)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_a_step_tied_to_the_output_gets_both_gradients(
    rule: Rule, residual: Residual, per_channel: bool, delta: float
) -> None:
    values = operands(rule, per_channel)
    rule = Rule(rule.steps, rule.offset, residual)
    values["out_step"] = values["step"].clone()
    above = torch.randn(values["x"].shape)
    apart = gradients(values, rule, above, delta)
    values["step"].requires_grad_()
    values["x"].requires_grad_()
    tied = values | {"out_step": values["step"]}
    output = quantise(tied, rule, delta)
    output.backward(above)
    assert torch.equal(output, quantise(values, rule))
    torch.testing.assert_close(values["x"].grad, apart["x"])
    wanted = apart["step"] + apart["out_step"]
    # level and position are summed apart in one case, their difference in the other
    atol = RTOL * float(above.abs().sum())
    torch.testing.assert_close(values["step"].grad, wanted, rtol=RTOL, atol=atol)


@grids
@settings(max_examples=25, deadline=None)
@given(delta=st.floats(0, 1, width=32), seed=st.integers(0, 2**31))
def test_the_discretisation_error_scales_the_gradient(rule: Rule, delta: float, seed: int) -> None:
    """SQAKD §3.2, in its own [0, 1] terms: ∂L/∂x_c = g + δ·|g|·(x_c − x_q)."""
    values = operands(rule, seed=seed)
    above = torch.randn(values["x"].shape, generator=torch.Generator().manual_seed(seed))
    found = gradients(values, rule, above, delta)["x"].double()
    x, step, low, high, out_step = (values[name].double() for name in OPERANDS)
    lower, upper = low * step, high * step
    x_c = ((x - lower) / (upper - lower)).clamp(0, 1)
    x_q = torch.round(rule.steps * x_c) / rule.steps  # no ties here
    g = above.double() * out_step * rule.steps
    inside = (x >= lower) & (x <= upper)
    wanted = (g + delta * g.abs() * (x_c - x_q)) * inside / (upper - lower)
    torch.testing.assert_close(found, wanted, rtol=RTOL, atol=0)


@grids
def test_a_level_below_its_input_pulls_more_on_a_positive_gradient(rule: Rule) -> None:
    """The sign of δ's effect: x_c > x_q and g > 0 lengthen the step, g < 0 shorten it."""
    low, high = CENTRE[rule]
    level = low + 3
    x = torch.tensor([level + 0.3, level - 0.3])
    values = {"x": x, "step": torch.tensor(1.0), "out_step": torch.tensor(1.0)}
    values |= {"low": torch.tensor(low), "high": torch.tensor(high)}
    up, down = gradients(values, rule, torch.ones(2), 0.5)["x"].tolist()
    assert up == pytest.approx(1 + 0.5 * 0.3 / rule.steps, rel=1e-6)
    assert down == pytest.approx(1 - 0.5 * 0.3 / rule.steps, rel=1e-6)
    up, down = gradients(values, rule, -torch.ones(2), 0.5)["x"].tolist()
    assert up == pytest.approx(-1 + 0.5 * 0.3 / rule.steps, rel=1e-6)
    assert down == pytest.approx(-1 - 0.5 * 0.3 / rule.steps, rel=1e-6)


@grids
def test_delta_leaves_the_levels_own_gradients_alone(rule: Rule) -> None:
    values = operands(rule)
    above = torch.randn(values["x"].shape)
    plain, scaled = gradients(values, rule, above), gradients(values, rule, above, 0.9)
    for name in ("low", "high", "out_step"):
        assert torch.equal(plain[name], scaled[name]), name
    assert not torch.equal(plain["x"], scaled["x"])
    assert not torch.equal(plain["step"], scaled["step"])


def test_bounds_are_inside_and_what_lies_beyond_gets_no_gradient() -> None:
    values = {name: torch.tensor(1.0) for name in ("step", "out_step")}
    values |= {"low": torch.tensor(-4.0), "high": torch.tensor(3.0)}
    values["x"] = torch.tensor([-4.001, -4.0, 3.0, 3.001])
    assert gradients(values, MID_TREAD, torch.ones(4))["x"].tolist() == [0, 1, 1, 0]
    everything = Rule(7, clip_gradient=False)
    assert gradients(values, everything, torch.ones(4))["x"].tolist() == [1, 1, 1, 1]


def test_only_what_needs_a_gradient_gets_one() -> None:
    values = operands(MID_TREAD)
    values["out_step"].requires_grad_()
    quantise(values, MID_TREAD).sum().backward()
    assert values["out_step"].grad is not None
    assert all(values[name].grad is None for name in ("x", "step", "low", "high"))


# -- helpers -------------------------------------------------------------------------------------

reals = st.floats(-100, 100, width=32)


@given(x=reals, factor=st.floats(-4, 4))
def test_scale_gradient_changes_the_gradient_only(x: float, factor: float) -> None:
    leaf = torch.tensor(x, requires_grad=True)
    result = scale_gradient(leaf, factor)
    result.backward()
    assert result.item() == leaf.item()
    assert leaf.grad is not None
    assert leaf.grad.item() == pytest.approx(factor, rel=1e-6)


@given(x=st.one_of(reals, st.floats(-(2.0**-18), 2.0**-18, width=32)))
def test_positive_is_the_magnitude_and_no_value_is_a_trap(x: float) -> None:
    leaf = torch.tensor(x, requires_grad=True)
    result = positive(leaf)
    result.backward()
    assert result.item() == max(abs(leaf.item()), torch.tensor(MIN_STEP).item())
    assert leaf.grad is not None
    assert leaf.grad.item() == (-1 if x < 0 else 1)


@given(x=reals, low=st.integers(-8, 0), width=st.integers(1, 255))
def test_round_through_rounds_half_to_even_and_clips(x: float, low: int, width: int) -> None:
    leaf = torch.tensor(x, requires_grad=True)
    result = round_through(leaf, low, low + width)
    result.backward()
    assert result.item() == min(max(round(x), low), low + width)  # Python rounds half to even
    assert leaf.grad is not None
    assert leaf.grad.item() == 1


@given(x=reals, limit=st.floats(0.125, 50, width=32))
def test_at_most_bounds_and_passes_the_gradient(x: float, limit: float) -> None:
    leaf = torch.tensor(x, requires_grad=True)
    result = at_most(leaf, limit)
    result.backward()
    assert result.item() == min(x, limit)
    assert leaf.grad is not None
    assert leaf.grad.item() == 1


def test_replacements_are_exact_where_adding_a_difference_would_not_be() -> None:
    x = torch.tensor(1e8, requires_grad=True)
    assert at_most(x, 0.1).item() == torch.tensor(0.1).item()
    assert math.isclose(positive(torch.tensor(1e-30)).item(), MIN_STEP, rel_tol=1e-6)

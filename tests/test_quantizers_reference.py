"""Every method against its closed form: the output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizer_references import (
    ACTIVATION_REFERENCES,
    EPSILON,
    WEIGHT_REFERENCES,
    Array,
    Reference,
    levels_around_zero,
    weight_levels,
)
from torch import Tensor, nn

from sqakd_deploy.quantizers import METHODS, ActivationQuantizer, WeightQuantizer
from sqakd_deploy.quantizers.unified import MIN_STEP

BITS = range(1, 9)
FLOAT32 = 2.0**-24  # half a unit in the last place, relative

# The output is a level times a scale that took a few float32 operations to compute.
OUTPUT_RTOL = 8 * FLOAT32
# A gradient of the input is a product of about ten float32 numbers; x_c − x_q, which δ multiplies,
# is known to 255 roundings of the position, of 1/255 each.
INPUT_RTOL = 32 * FLOAT32
# Sums over elements whose largest parts (level and position, up to 255 steps) cancel to a residual
# of half a step: errors are relative to the largest part, not to the sum.
SUM_RTOL = 32 * FLOAT32
# l + (u − l)·x_q in float64 misses a level at zero by this, in parts of the largest.
REFERENCE_NOISE = 1e-14
# Half precision rounds what goes in and out once; arithmetic is float32.
TYPE_RTOL = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TYPE_ATOL = {torch.float32: 1e-30, torch.float16: 2.0**-24, torch.bfloat16: 1e-30}

# Positions (in steps) are at most 4·255, which float32 knows to 6e-5, and the reference to 1e-13.
# Closer than this to a tie or to a bound, the two may decide differently and both be right.
MARGIN = 1e-3

quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@dataclass
class Case:
    """A tensor in rows that share parameters, the rows' parameters, and the gradient above."""

    x: Tensor
    grad: Tensor
    parameters: list[dict[str, float]]
    delta: float


def test_every_method_has_references() -> None:
    assert set(WEIGHT_REFERENCES) == set(METHODS)
    assert set(ACTIVATION_REFERENCES) == set(METHODS)
    assert EPSILON == MIN_STEP


# -- positions -----------------------------------------------------------------------------------


def exact_positions(steps: int, size: int) -> st.SearchStrategy[list[float]]:
    """Quarter steps: levels, ties and bounds fall on them, and float32 holds them exactly."""
    anywhere = st.integers(-6 * steps, 6 * steps)
    ties = st.integers(-steps, steps).map(lambda k: 4 * k + 2)
    bounds = st.sampled_from([-4 * steps, -2 * steps, 0, 2 * steps, 4 * steps])
    quarters = st.one_of(anywhere, ties, bounds)
    return st.lists(quarters, min_size=size, max_size=size).map(lambda q: [i / 4 for i in q])


def settled(positions: Array, *bounds: float) -> Array:
    """Positions moved by a tenth of a step where they are within MARGIN of a tie or a bound."""
    to_tie = np.abs(np.abs(positions % 1) - 0.5)
    to_half_grid_tie = np.minimum(positions % 1, 1 - positions % 1)  # ties of a mid-rise grid
    to_bound = np.min([np.abs(positions - b) for b in bounds], axis=0)
    near = np.minimum(np.minimum(to_tie, to_half_grid_tie), to_bound) < MARGIN
    return np.where(near, positions + 0.1, positions)


def spread_positions(rng: np.random.Generator, steps: int, size: int) -> Array:
    """Inside, clipped and far outside the range."""
    reach = rng.choice([0.3, 1.0, 4.0]) * max(steps, 2)
    return rng.uniform(-reach, reach, size)


# -- parameters ----------------------------------------------------------------------------------


def weight_parameters(
    method: str, bits: int, unit: float, centre: float, rng: np.random.Generator
) -> dict[str, float]:
    """Parameters under which the step is ``unit``, some negative or crossed; and what is fixed."""
    steps, _ = weight_levels(bits, mid_rise=True)
    if method == "ste":
        return {"step": unit}
    if method == "lsq":
        return {"step": unit * rng.choice([-1, 1])}
    if method == "ewgs":
        ends = rng.permutation([centre - steps * unit / 2, centre + steps * unit / 2])
        scale = float(np.float32(rng.uniform(0.5, 2) * steps * unit * rng.choice([-1, 1])))
        return {"lower": ends[0], "upper": ends[1], "output_scale": scale}
    return {"gain": 1.0 if bits == 1 else float(np.float32(rng.uniform(0.1, 3)))}


def activation_parameters(
    method: str, bits: int, unit: float, zero: float | None, rng: np.random.Generator
) -> dict[str, float]:
    """Parameters under which the step is ``unit`` and the zero-point ``zero`` (None: unsigned)."""
    steps = 2**bits - 1
    if method == "lsq":
        signed = {} if zero is None else {"zero_point": zero}
        return {"step": unit * rng.choice([-1, 1]), **signed}
    lower = 0.0 if zero is None else -zero * unit
    upper = lower + steps * unit
    if method in ("pact", "ewgs") and rng.random() < 0.3:
        upper = lower - steps * unit  # crossed
    name = "alpha" if method == "pact" else "upper"
    values = {name: upper} if zero is None else {"lower": lower, name: upper}
    if method == "ewgs":
        values["out_step"] = float(np.float32(unit * rng.uniform(0.5, 2)))
    return values


def symmetric_parameters(
    method: str, bits: int, unit: float, signed: bool, rng: np.random.Generator
) -> dict[str, float]:
    """Parameters under which the step is ``unit`` around a fixed zero, some negative."""
    steps, zero = levels_around_zero(bits, signed)
    if method in ("ste", "dorefa"):
        return {"lower": -zero * unit, "upper": (steps - zero) * unit}
    name = {"lsq": "step", "pact": "alpha", "ewgs": "upper"}[method]
    size = unit if method == "lsq" else (steps - zero) * unit
    values = {name: size * rng.choice([-1, 1])}
    if method == "ewgs":
        values["out_step"] = float(np.float32(unit * rng.uniform(0.5, 2)))
    return values


def delta_of(method: str, rng: np.random.Generator) -> float:
    """δ > 0 for half the cases of the methods that use it (a float32 exactly)."""
    return float(rng.choice([0.0, 0.75])) if METHODS[method].scales_gradient else 0.0


def float32(values: dict[str, float]) -> dict[str, float]:
    return {name: float(np.float32(value)) for name, value in values.items()}


def gradient(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = rng.normal(size=shape) * rng.choice([0.1, 1, 10]) * (rng.random(shape) > 0.1)
    return torch.tensor(values, dtype=torch.float32).to(dtype)


# -- comparison ----------------------------------------------------------------------------------


def compare_weight(method: str, bits: int, per_channel: bool, case: Case) -> None:
    """Run the module on ``(rows, K)`` weights and compare row by row, or as one tensor."""
    weight = nn.Parameter(case.x.clone())
    quantizer = METHODS[method].weight(weight, bits, per_channel)
    for name in case.parameters[0]:
        values = torch.tensor([row[name] for row in case.parameters])
        getattr(quantizer, name).data.copy_(quantizer.shaped(values))
    quantizer.delta.fill_(case.delta)
    rows = [slice(i, i + 1) for i in range(len(case.x))] if per_channel else [slice(None)]

    def reference(index: int) -> Reference:
        part = rows[index]
        x, grad = case.x[part].double().numpy(), case.grad[part].double().numpy()
        return WEIGHT_REFERENCES[method](x, grad, bits, case.parameters[index], case.delta)

    output = quantizer(weight)[0]
    _compare(quantizer, weight, output, case, rows, reference)


def compare_activation(
    method: str, bits: int, signed: bool, case: Case, *, symmetric: bool = False
) -> None:
    """Run the module on ``(samples, features)`` and compare."""
    quantizer = METHODS[method].activation(bits, signed, symmetric=symmetric)
    around = levels_around_zero(bits, signed) if symmetric else None
    quantizer.observe(torch.ones(1, 1))
    for name, value in case.parameters[0].items():
        getattr(quantizer, name).data.fill_(value)
    quantizer.delta.fill_(case.delta)
    x = case.x.clone().requires_grad_()

    def reference(index: int) -> Reference:
        values = case.x.double().numpy(), case.grad.double().numpy()
        return ACTIVATION_REFERENCES[method](*values, bits, case.parameters[0], case.delta, around)

    _compare(quantizer, x, quantizer(x)[0], case, [slice(None)], reference)


def _compare(
    quantizer: WeightQuantizer | ActivationQuantizer,
    x: Tensor,
    output: Tensor,
    case: Case,
    rows: list[slice],
    reference: Callable[[int], Reference],
) -> None:
    output.backward(case.grad)
    assert x.grad is not None
    assert output.dtype == x.grad.dtype == case.x.dtype
    rtol, atol = TYPE_RTOL[case.x.dtype], TYPE_ATOL[case.x.dtype]
    learned = dict(quantizer.named_parameters())
    for index, part in enumerate(rows):
        wanted = reference(index)
        assert set(wanted.terms) == set(learned)
        noise = REFERENCE_NOISE * float(np.abs(wanted.output).max())
        np.testing.assert_allclose(
            output[part].detach().double().numpy(), wanted.output, OUTPUT_RTOL + rtol, atol + noise
        )
        np.testing.assert_allclose(
            x.grad[part].double().numpy(), wanted.grad_input, INPUT_RTOL + rtol, atol
        )
        total = float(case.grad[part].double().abs().sum())
        for name, terms in wanted.terms.items():
            grad = learned[name].grad
            assert grad is not None
            assert grad.dtype == torch.float32
            tolerance = SUM_RTOL * wanted.reach[name] * total
            got = float(grad.flatten()[index])
            assert got == pytest.approx(terms.sum(), rel=0, abs=tolerance), name


# -- weights -------------------------------------------------------------------------------------

every_method = pytest.mark.parametrize("method", sorted(METHODS))
every_width = pytest.mark.parametrize("bits", BITS)
both_shapes = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
both_signs = pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
uniform = pytest.mark.parametrize("method", ["ewgs", "lsq", "ste"])
ROWS, COLUMNS = 3, 8


@uniform
@every_width
@both_shapes
@quick
@given(data=st.data(), seed=seeds, dtype=dtypes)
def test_weights_on_ties_levels_and_bounds(
    method: str, bits: int, per_channel: bool, data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    steps = weight_levels(bits, mid_rise=True)[0]
    positions = np.array(data.draw(exact_positions(steps, ROWS * COLUMNS))).reshape(ROWS, COLUMNS)
    units = 2.0 ** rng.integers(-6, 3, ROWS if per_channel else 1)
    centres = units * (rng.integers(-8, 9, len(units)) / 4 if method == "ewgs" else 0)
    x = centres[:, None] + units[:, None] * positions
    case = Case(
        torch.tensor(x, dtype=torch.float32).to(dtype),
        gradient(rng, x.shape, dtype),
        [weight_parameters(method, bits, u, c, rng) for u, c in zip(units, centres, strict=True)],
        delta_of(method, rng),
    )
    compare_weight(method, bits, per_channel, case)


@uniform
@every_width
@both_shapes
@quick
@given(seed=seeds, scale=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
def test_weights_of_any_scale(
    method: str, bits: int, per_channel: bool, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    steps, first = weight_levels(bits, mid_rise=method == "ewgs")
    low = -steps / 2 if first is None else first
    units = scale * rng.uniform(0.3, 3, ROWS if per_channel else 1).astype(np.float32)
    centres = units * (rng.uniform(-steps, steps, len(units)) if method == "ewgs" else 0)
    positions = settled(spread_positions(rng, steps, ROWS * COLUMNS), low, low + steps)
    x = centres[:, None] + units[:, None] * positions.reshape(ROWS, COLUMNS)
    rows = [weight_parameters(method, bits, u, c, rng) for u, c in zip(units, centres, strict=True)]
    case = Case(
        torch.tensor(x, dtype=torch.float32),
        gradient(rng, x.shape, torch.float32),
        [float32(row) for row in rows],
        delta_of(method, rng),
    )
    compare_weight(method, bits, per_channel, case)


@pytest.mark.parametrize("method", ["dorefa", "pact"])
@every_width
@both_shapes
@quick
@given(seed=seeds, scale=st.sampled_from([0.01, 0.1, 1.0, 1.8]), dtype=dtypes)
def test_tanh_weights(
    method: str, bits: int, per_channel: bool, seed: int, scale: float, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-scale, scale, (ROWS, COLUMNS))
    x[:, 0] = scale * rng.choice([-1, 1], ROWS)  # the largest lies on the bound
    weight = torch.tensor(x, dtype=torch.float32).to(dtype)
    gains = [weight_parameters(method, bits, 1.0, 0.0, rng) for _ in range(ROWS)]
    case = Case(
        _clear_of_ties(weight, bits), gradient(rng, x.shape, dtype), gains[: ROWS**per_channel], 0.0
    )
    compare_weight(method, bits, per_channel, case)


def _clear_of_ties(weight: Tensor, bits: int) -> Tensor:
    """Weights whose tanh falls within MARGIN of a tie are replaced by the largest one.

    tanh is known to one rounding only, so that ties other than 0 cannot be hit exactly.
    """
    steps, first = weight_levels(bits, mid_rise=True)
    squashed = np.tanh(weight.double().numpy())
    positions = squashed / np.abs(squashed).max() * steps / 2 + steps / 2 + (first or 0)
    near = torch.tensor(np.abs(positions % 1 - 0.5) < MARGIN)
    return torch.where(near, weight[:, :1], weight)


@every_method
@every_width
@both_shapes
def test_all_zero_weights(method: str, bits: int, per_channel: bool) -> None:
    rng = np.random.default_rng(bits)
    unit = [0.25, 2.0, 0.5][: ROWS**per_channel]
    case = Case(
        torch.zeros(ROWS, COLUMNS),
        gradient(rng, (ROWS, COLUMNS), torch.float32),
        [weight_parameters(method, bits, u, 0.0, rng) for u in unit],
        delta_of(method, rng),
    )
    compare_weight(method, bits, per_channel, case)


@every_method
@every_width
def test_a_dead_channel_among_others(method: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    x = rng.integers(-10, 11, (ROWS, COLUMNS)) / 8
    x[:, 0] = 1.5
    x[1] = 0.0
    weight = _clear_of_ties(torch.tensor(x, dtype=torch.float32), bits)
    weight[1] = 0.0
    rows = [weight_parameters(method, bits, u, 0.0, rng) for u in (0.25, 0.5, 1.0)]
    case = Case(weight, gradient(rng, x.shape, torch.float32), rows, delta_of(method, rng))
    compare_weight(method, bits, True, case)


@every_width
@both_shapes
@pytest.mark.parametrize("gap", [0.0, 1e-9, -1e-9, 2.0**-20, -(2.0**-20)])
@pytest.mark.parametrize("scale", [1.0, -1e-9, 0.0])
def test_ewgs_weights_whose_bounds_meet(
    bits: int, per_channel: bool, gap: float, scale: float
) -> None:
    rng = np.random.default_rng(bits)
    positions = rng.permutation(np.repeat([0.0, 1e5, -1e5, 0.2], 6)).reshape(ROWS, COLUMNS)
    lower, upper = -gap / 2, gap / 2
    parameters = float32({"lower": lower, "upper": upper, "output_scale": scale})
    case = Case(
        torch.tensor(positions * EPSILON, dtype=torch.float32),
        gradient(rng, (ROWS, COLUMNS), torch.float32),
        [parameters] * (ROWS**per_channel),
        0.75,
    )
    compare_weight("ewgs", bits, per_channel, case)


@every_width
@pytest.mark.parametrize("step", [0.0, 1e-9, -1e-9])
def test_lsq_weights_whose_step_vanishes(bits: int, step: float) -> None:
    rng = np.random.default_rng(bits)
    positions = rng.permutation(np.repeat([0.0, 1e5, -1e5, 0.2], 6)).reshape(ROWS, COLUMNS)
    case = Case(
        torch.tensor(positions * EPSILON, dtype=torch.float32),
        gradient(rng, (ROWS, COLUMNS), torch.float32),
        [float32({"step": step})],
        0.0,
    )
    compare_weight("lsq", bits, False, case)


# -- activations ---------------------------------------------------------------------------------

SAMPLES, FEATURES = 2, 12


@every_method
@every_width
@both_signs
@quick
@given(data=st.data(), seed=seeds, dtype=dtypes)
def test_activations_on_ties_levels_and_bounds(
    method: str, bits: int, signed: bool, data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    steps = 2**bits - 1
    positions = np.array(data.draw(exact_positions(steps, SAMPLES * FEATURES)))
    unit = 2.0 ** rng.integers(-6, 3)
    zero = data.draw(st.integers(-6, 4 * steps + 6)) / 4 if signed else None
    x = (unit * positions).reshape(SAMPLES, FEATURES)
    case = Case(
        torch.tensor(x, dtype=torch.float32).to(dtype),
        gradient(rng, x.shape, dtype),
        [activation_parameters(method, bits, unit, zero, rng)],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case)


@every_method
@every_width
@both_signs
@quick
@given(seed=seeds, scale=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
def test_activations_of_any_scale(
    method: str, bits: int, signed: bool, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    steps = 2**bits - 1
    unit = float(np.float32(scale * rng.uniform(0.3, 3)))
    nearest = int(rng.integers(0, steps + 1)) if signed else 0
    zero = nearest + rng.uniform(-0.4, 0.4) if signed else None
    positions = settled(spread_positions(rng, steps, SAMPLES * FEATURES), -nearest, steps - nearest)
    parameters = activation_parameters(method, bits, unit, zero, rng)
    case = Case(
        torch.tensor((unit * positions).reshape(SAMPLES, FEATURES), dtype=torch.float32),
        gradient(rng, (SAMPLES, FEATURES), torch.float32),
        [float32(parameters)],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case)


@every_method
@every_width
@both_signs
def test_all_zero_activations(method: str, bits: int, signed: bool) -> None:
    rng = np.random.default_rng(bits)
    case = Case(
        torch.zeros(SAMPLES, FEATURES),
        gradient(rng, (SAMPLES, FEATURES), torch.float32),
        [activation_parameters(method, bits, 0.25, 1.0 if signed else None, rng)],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case)


@pytest.mark.parametrize("method", ["ewgs", "lsq", "pact"])
@every_width
@both_signs
@pytest.mark.parametrize("width", [0.0, 1e-9, -1e-9])
def test_activations_whose_range_vanishes(
    method: str, bits: int, signed: bool, width: float
) -> None:
    rng = np.random.default_rng(bits)
    positions = rng.permutation(np.repeat([0.0, 1e5, -1e5, 0.2], 6)).reshape(SAMPLES, FEATURES)
    parameters = {"lsq": {"step": width}, "pact": {"alpha": width}, "ewgs": {"upper": width}}[
        method
    ]
    if method == "ewgs":
        parameters["out_step"] = 0.5
    if signed:
        parameters["zero_point" if method == "lsq" else "lower"] = 0.0
    case = Case(
        torch.tensor(positions * EPSILON, dtype=torch.float32),
        gradient(rng, (SAMPLES, FEATURES), torch.float32),
        [float32(parameters)],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case)


# -- activations around a fixed zero -------------------------------------------------------------

some_widths = pytest.mark.parametrize("bits", [1, 2, 4, 8])
few = settings(max_examples=4, deadline=None)


@every_method
@some_widths
@both_signs
@few
@given(data=st.data(), seed=seeds, dtype=dtypes)
def test_symmetric_activations_on_ties_levels_and_bounds(
    method: str, bits: int, signed: bool, data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    steps, _ = levels_around_zero(bits, signed)
    positions = np.array(data.draw(exact_positions(steps, SAMPLES * FEATURES)))
    unit = 2.0 ** rng.integers(-6, 3)
    x = (unit * positions).reshape(SAMPLES, FEATURES)
    case = Case(
        torch.tensor(x, dtype=torch.float32).to(dtype),
        gradient(rng, x.shape, dtype),
        [symmetric_parameters(method, bits, unit, signed, rng)],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case, symmetric=True)


@every_method
@some_widths
@both_signs
@few
@given(seed=seeds, scale=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]))
def test_symmetric_activations_of_any_scale(
    method: str, bits: int, signed: bool, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    steps, zero = levels_around_zero(bits, signed)
    unit = float(np.float32(scale * rng.uniform(0.3, 3)))
    positions = settled(spread_positions(rng, steps, SAMPLES * FEATURES), -zero, steps - zero)
    case = Case(
        torch.tensor((unit * positions).reshape(SAMPLES, FEATURES), dtype=torch.float32),
        gradient(rng, (SAMPLES, FEATURES), torch.float32),
        [float32(symmetric_parameters(method, bits, unit, signed, rng))],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case, symmetric=True)


@pytest.mark.parametrize("method", ["ewgs", "lsq", "pact"])
@some_widths
@both_signs
@pytest.mark.parametrize("width", [0.0, 1e-9, -1e-9])
def test_symmetric_activations_whose_range_vanishes(
    method: str, bits: int, signed: bool, width: float
) -> None:
    rng = np.random.default_rng(bits)
    positions = rng.permutation(np.repeat([0.0, 1e5, -1e5, 0.2], 6)).reshape(SAMPLES, FEATURES)
    name = {"lsq": "step", "pact": "alpha", "ewgs": "upper"}[method]
    parameters = {name: width} | ({"out_step": 0.5} if method == "ewgs" else {})
    case = Case(
        torch.tensor(positions * EPSILON, dtype=torch.float32),
        gradient(rng, (SAMPLES, FEATURES), torch.float32),
        [float32(parameters)],
        delta_of(method, rng),
    )
    compare_activation(method, bits, signed, case, symmetric=True)

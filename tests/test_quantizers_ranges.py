"""The range search against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from sqakd_deploy.quantizers.ranges import (
    search_around_zero,
    search_range,
    search_step,
    thin_out,
    thin_out_rows,
)

CANDIDATES = 64
# float32 errors of a mean of squares, relative
RTOL = 1e-5

DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "outlier": lambda rng, n: np.append(rng.normal(size=n - 1), 50.0),
    "shifted": lambda rng, n: rng.normal(size=n) + 2,
    "negative": lambda rng, n: -np.abs(rng.normal(size=n)),
}
distributions = st.sampled_from(sorted(DISTRIBUTIONS))
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 1.0, 1e3])
quick = settings(max_examples=20, deadline=None)
every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


def sample(name: str, seed: int, scale: float, size: int = 200) -> Tensor:
    values = DISTRIBUTIONS[name](np.random.default_rng(seed), size) * scale
    return torch.tensor(values, dtype=torch.float32)


def error(x: NDArray[np.float64], levels: NDArray[np.float64]) -> float:
    """Mean squared distance from the nearest level."""
    return float((np.abs(x[:, None] - levels).min(axis=1) ** 2).mean())


def activation_levels(low: float, high: float, bits: int) -> NDArray[np.float64]:
    steps = 2**bits - 1
    step = (high - low) / steps
    zero = np.clip(np.rint(-low / step), 0, steps)
    return (np.arange(steps + 1) - zero) * step


SAMPLED = 1.01  # candidates are up to a twentieth apart, and a sample errs


@every_width
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@quick
@given(name=distributions, seed=seeds, scale=scales)
def test_no_candidate_range_beats_the_one_found(
    bits: int, signed: bool, name: str, seed: int, scale: float
) -> None:
    x = sample(name, seed, scale)
    lower, upper = (float(bound) for bound in search_range(x, bits, signed=signed))
    assert lower <= 0 <= upper
    assert lower < upper
    if not signed:
        assert lower == 0
    values = x.double().numpy()
    least = min(values.min(), 0.0) if signed else 0.0
    most = max(values.max(), 0.0)
    if most == least:
        return  # nothing to fit: unsigned and negative
    found = error(values, activation_levels(lower, upper, bits))
    fractions = np.arange(1, CANDIDATES + 1) / CANDIDATES
    best = min(error(values, activation_levels(least * f, most * f, bits)) for f in fractions)
    assert found <= best * (1 + RTOL)
    fraction = (upper - lower) / (most - least) * CANDIDATES
    assert fraction == pytest.approx(round(fraction), rel=1e-5)


@every_width
@pytest.mark.parametrize("mid_rise", [False, True], ids=["mid-tread", "mid-rise"])
@quick
@given(name=distributions, seed=seeds, scale=scales)
def test_no_candidate_step_beats_the_one_found(
    bits: int, mid_rise: bool, name: str, seed: int, scale: float
) -> None:
    rows = torch.stack([sample(name, seed, scale), sample("normal", seed + 1, scale * 0.1)])
    steps = 2**bits - 1
    low = -steps / 2 if mid_rise or bits == 1 else -(2.0 ** (bits - 1))
    offset = steps / 2 if mid_rise or bits == 1 else 0.0
    found = search_step(rows, low, low + steps, offset)
    levels = low + np.arange(steps + 1)
    for row, step in zip(rows.double().numpy(), found.tolist(), strict=True):
        full = max(row.max() / (low + steps), row.min() / low)
        fractions = np.arange(1, CANDIDATES + 1) / CANDIDATES
        best = min(error(row, levels * full * f) for f in fractions)
        assert error(row, levels * step) <= best * (1 + RTOL)
        assert step > 0


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 15), (0, 127), (-2, 1), (-8, 7), (-128, 127)]
)
@quick
@given(name=distributions, seed=seeds, scale=scales)
def test_no_candidate_step_around_zero_beats_the_one_found(
    low: int, high: int, name: str, seed: int, scale: float
) -> None:
    x = sample(name, seed, scale)
    step = float(search_around_zero(x, low, high))
    assert step > 0
    values, levels = x.double().numpy(), np.arange(low, high + 1)
    full = max(values.max() / high, values.min() / low if low else 0.0)
    if full <= 0:
        return  # nothing to fit: codes are not negative, the tensor is
    fractions = np.arange(1, CANDIDATES + 1) / CANDIDATES
    best = min(error(values, levels * full * f) for f in fractions)
    assert error(values, levels * step) <= best * (1 + RTOL)


@pytest.mark.parametrize("value", [0.0, 1e-40, -1.0])
def test_nothing_to_fit_around_zero_gets_a_unit_range(value: float) -> None:
    assert float(search_around_zero(torch.full((3, 5), value), 0, 127)) == pytest.approx(1 / 127)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-7])
def test_an_all_zero_tensor_gets_a_unit_range(signed: bool, value: float) -> None:
    lower, upper = search_range(torch.full((3, 5), value), 4, signed=signed)
    assert (float(lower), float(upper)) == (-1.0 if signed else 0.0, 1.0)


def test_a_negative_tensor_without_sign_gets_a_unit_range() -> None:
    lower, upper = search_range(-torch.rand(10), 4, signed=False)
    assert (float(lower), float(upper)) == (0.0, 1.0)


def test_an_all_zero_row_gets_a_positive_step_and_leaves_the_others_alone() -> None:
    rows = torch.randn(3, 20)
    alone = search_step(rows, -8.0, 7.0, 0.0)
    rows[1] = 0.0
    found = search_step(rows, -8.0, 7.0, 0.0)
    assert found[1] > 0
    assert torch.equal(found[[0, 2]], alone[[0, 2]])


@given(count=st.integers(1, 40), size=st.integers(1, 300), limit=st.integers(1, 100))
def test_thinning_keeps_at_most_the_limit_evenly(count: int, size: int, limit: int) -> None:
    x = torch.arange(float(count * size)).reshape(count, size)
    thin = thin_out(x, limit)
    assert 1 <= thin.numel() <= limit
    # The next number without a common factor is 11 for twice 3·5·7.
    assert thin.numel() > limit * 2 / 11 - 1 or thin.numel() == x.numel()
    gaps = thin.diff()
    assert (gaps == gaps[:1]).all()


@pytest.mark.parametrize("shape", [(256, 16, 32, 32), (64, 512, 7, 7), (16, 64, 112, 112)])
def test_thinning_visits_every_row_column_and_channel_alike(shape: tuple[int, ...]) -> None:
    """A spacing that the width divides took the left border alone."""
    for axis in (1, 2, 3):
        sizes = [1] * 4
        sizes[axis] = shape[axis]
        places = torch.arange(shape[axis]).reshape(sizes).expand(shape)
        counts = torch.bincount(thin_out(places), minlength=shape[axis])
        assert counts.min() > 0.9 * counts.max()


def test_an_empty_border_does_not_decide_a_range() -> None:
    x = torch.zeros(64, 16, 32, 32)
    x[:, :, 4:-4, 4:-4] = torch.rand(64, 16, 24, 24) * 20
    _, upper = search_range(x, 8, signed=False)
    assert float(upper) > 19


def test_a_large_tensor_is_searched_by_its_sample() -> None:
    x = torch.randn(1 << 17)
    lower, upper = search_range(x, 4, signed=True)
    wanted = search_range(thin_out(x), 4, signed=True)
    assert (lower, upper) == wanted


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@given(channels=st.integers(1, 400), limit=st.integers(20, 200))
def test_thinning_of_rows_visits_every_place_of_a_kernel(
    kernel: int, channels: int, limit: int
) -> None:
    places = kernel * kernel
    rows = torch.arange(channels * places).repeat(2, 1)
    thin = thin_out_rows(rows, limit)
    assert thin.shape[0] == 2
    assert 1 <= thin.shape[1] <= limit
    assert thin.shape[1] == rows.shape[1] or (thin[0].diff() == thin[0, 1:2] - thin[0, 0]).all()
    if thin.shape[1] >= 2 * places:
        assert len(set((thin[0] % places).tolist())) == places


def test_the_sample_of_a_large_weight_finds_a_step_as_good_as_any() -> None:
    row = torch.randn(1, 1 << 20, generator=torch.Generator().manual_seed(0))
    found = float(search_step(row, -8.0, 7.0, 0.0))
    full = max(float(row.max()) / 7, float(row.min()) / -8)  # not only the sample's
    assert found / full * CANDIDATES == pytest.approx(round(found / full * CANDIDATES), rel=1e-6)
    values, levels = row[0].double().numpy(), np.arange(-8, 8)
    near = [found * (1 + k / 20) for k in range(-10, 11)]
    best = min(error(values, levels * step) for step in near)
    assert error(values, levels * found) <= best * SAMPLED


@pytest.mark.parametrize("seed", range(3))
def test_two_levels_are_the_mean_size_of_weights_with_heavy_tails(seed: int) -> None:
    row = np.random.default_rng(seed).standard_t(3, 4096).astype(np.float32)
    step = float(search_step(torch.from_numpy(row)[None], -0.5, 0.5, 0.5))
    assert step / 2 == pytest.approx(np.abs(row).mean(), rel=1e-5)
    levels = np.array([-0.5, 0.5])
    finer = np.linspace(0.1, 3, 400) * step
    best = min(error(row.astype(np.float64), levels * s) for s in finer)
    assert error(row.astype(np.float64), levels * step) <= best * (1 + RTOL)

"""Codes that lie between two levels are what runtimes round differently: steps are moved off."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import CLASSES, SHAPE, images, network
from torch import Tensor, nn

import sqakd_deploy
from sqakd_deploy.lowering.borders import (
    Mean,
    Met,
    Several,
    _moved,
    _Walk,
    off_borders,
    settle,
)
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.quantization import activation_quantizers, calibrate, quantize
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import QuantSpec, TensorSpec

SUM = ("quant_one", "quant_relu", "quant_relu_1")  # of the terms, and of the sum


class Joined(nn.Module):
    """A sum, a product, a mean of a whole image and one of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.other = nn.Conv2d(3, 6, 3, padding=1)
        self.classifier = nn.Linear(6, CLASSES)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x), self.other(x).relu()
        added = (one + other).relu()
        product = self.pool(added * other)
        return self.classifier(product.mean([2, 3]))


def student_of(method: str = "lsq", bits: int = 8) -> Any:
    torch.manual_seed(0)
    side = TensorSpec(bits=bits, method=method)
    spec = QuantSpec(weights=side, activations=side)
    student = quantize(Joined().eval(), spec, example=SHAPE)
    calibrate(student, images())
    return student


def grids(student: Any) -> dict[str, tuple[float, int, float]]:
    return {n.split(".")[0]: q.grid() for n, q in activation_quantizers(student).items()}


def levels(quantizer: Any) -> np.ndarray:
    _, zero, _ = quantizer.grid()
    return np.arange(-zero, quantizer.steps - zero + 1)


def quantizer_at(student: Any, name: str) -> Any:
    return next(q for n, q in activation_quantizers(student).items() if n.split(".")[0] == name)


def orders(student: Any) -> dict[str, list[np.ndarray]]:
    """Positions of every pair of the sum, by several orders of float32 operations."""
    one, other, total = (
        quantizer_at(student, n) for n in ("quant_one", "quant_relu", "quant_relu_1")
    )
    a, b = (levels(q).astype(np.float32) for q in (one, other))
    (_, za, sa), (_, zb, sb), (step, _, _) = one.grid(), other.grid(), total.grid()
    sa, sb, step = np.float32(sa), np.float32(sb), np.float32(step)
    za, zb = np.float32(za), np.float32(zb)
    dequantised = np.add.outer(a * sa, b * sb)
    ra, rb = sa / step, sb / step
    fixed = -(ra * za + rb * zb)
    kernel = np.add.outer((a + za) * ra + fixed, (b + zb) * rb)
    fused = np.add.outer(a.astype(float) * ra, b.astype(float) * rb).astype(np.float32)
    swapped = np.add.outer((a + za) * ra, (b + zb) * rb) + fixed
    return {"quant_relu_1": [dequantised / step, kernel, fused, swapped, dequantised * (1 / step)]}


def put_on_a_border(student: Any) -> None:
    """Levels 36 of one term and 88 of the other make 26½ steps, to float32's last place."""
    one, other, total = (
        quantizer_at(student, n) for n in ("quant_one", "quant_relu", "quant_relu_1")
    )
    with torch.no_grad():
        wanted = (36 * one.grid()[2] + 88 * other.grid()[2]) / 26.5
        factor = wanted / total.grid()[0]
        for tensor in total.range_tensors().values():
            tensor.mul_(factor)


@pytest.mark.parametrize("method", METHODS)
def test_no_pair_is_left_on_a_border(method: str) -> None:
    student = student_of(method)
    put_on_a_border(student)
    before = grids(student)
    assert off_borders(student) == ()
    after = grids(student)
    for positions in orders(student).values():
        total = quantizer_at(student, "quant_relu_1")
        found = [np.clip(np.rint(p), 0, total.grid()[1] + total.steps) for p in positions]
        for other in found[1:]:
            np.testing.assert_array_equal(found[0], other)
    for name, (step, zero, scale) in before.items():
        assert after[name][0] == pytest.approx(step, rel=2**-12)
        assert after[name][1] == zero
        assert after[name][2] == pytest.approx(scale, rel=2**-12)
    assert after["quant_relu_1"] != before["quant_relu_1"]
    for untouched in ("quant_x", "quant_one", "quant_relu"):  # the image, and behind convolutions
        assert after[untouched] == before[untouched]


def test_it_is_needed() -> None:
    """Orders do differ on the pair that was put there."""
    student = student_of()
    put_on_a_border(student)
    (positions,) = orders(student).values()
    assert any((np.rint(positions[0]) != np.rint(other)).any() for other in positions[1:])


def test_a_student_that_is_only_calibrated_is_settled() -> None:
    student, plain = student_of(), student_of()
    sqakd_deploy.calibrate(student, images())
    settle(plain)
    settled = plain.state_dict()
    assert any(not torch.equal(v, settled[n]) for n, v in student_of().state_dict().items())
    assert all(torch.equal(v, settled[n]) for n, v in student.state_dict().items())


def test_it_moves_nothing_twice() -> None:
    student = student_of()
    settle(student)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settle(student)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_mean_and_product_is_off(bits: int) -> None:
    student = student_of(bits=bits)
    assert off_borders(student) == ()
    names = list(grids(student))
    product, pooled = next(n for n in names if "mul" in n), next(n for n in names if "pool" in n)
    one, other = (quantizer_at(student, n) for n in ("quant_relu_1", "quant_relu"))
    pairs = np.multiply.outer(levels(one) * one.grid()[2], levels(other) * other.grid()[2])
    assert distance(pairs.ravel() / quantizer_at(student, product).grid()[0]) > 1e-6
    source = quantizer_at(student, product)
    sums = np.arange(4 * levels(source)[0], 4 * levels(source)[-1] + 1) * source.grid()[2] / 4
    assert distance(sums / quantizer_at(student, pooled).grid()[0]) > 1e-6


def distance(positions: np.ndarray) -> float:
    return float(np.abs(positions - np.floor(positions) - 0.5).min())


def test_a_step_that_cannot_move_is_told() -> None:
    """With no tensors to move by, as of a method that does not say which."""
    student = student_of()
    put_on_a_border(student)
    quantizer = quantizer_at(student, "quant_relu_1")
    quantizer.range_names = ()
    before = grids(student)
    assert "quant_relu_1" in off_borders(student)
    assert grids(student)["quant_relu_1"] == before["quant_relu_1"]


@given(
    level=st.integers(-100, 100),
    step=st.floats(2**-10, 10, width=32),
    beside=st.floats(-1e-3, 1e-3),
)
def test_margins_are_distances(level: int, step: float, beside: float) -> None:
    position = level + 0.5 + beside
    met = Met(np.array([position * step]), np.zeros(1))
    margin = met.margin(step, -128, 127)
    exact = abs(Fraction(position * step) / Fraction(step) - Fraction(2 * level + 1, 2))
    assert margin == pytest.approx(
        float(exact) / (2.0**-24 * (abs(position) + 255)), rel=1e-3, abs=1e-6
    )


@given(
    low=st.integers(-20, 0),
    high=st.integers(1, 40),
    count=st.integers(1, 60),
    step=st.floats(2**-6, 4),
    scale=st.floats(2**-6, 4),
    bound=st.floats(0, 20),
)
def test_means_are_looked_at_where_they_lie_next_to_a_border(
    low: int, high: int, count: int, step: float, scale: float, bound: float
) -> None:
    """As if all of them were."""
    mean = Mean(count * low, count * high, scale / count, -low * scale)
    sums = np.arange(mean.first, mean.last + 1) * mean.unit
    every = Met(sums, 2 * np.abs(sums) + mean.rounded)
    assert mean.margin(step, -8, 7) == every.margin(step, -8, 7)
    few = every.values[(every.values >= 0) & (every.values <= bound)]
    assert mean.cut(0.0, bound).margin(step, -8, 7) == Met(few, 2 * few + mean.rounded).margin(
        step, -8, 7
    )


def test_a_large_image_takes_no_longer() -> None:
    """Of 112×112 codes there are 3 million sums, and 510 next to a border."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    student = quantize(net.eval(), example=(3, 112, 112))
    calibrate(student, torch.randn(2, 3, 112, 112))
    off_borders(student)
    source, pooled = (quantizer_at(student, n) for n in ("quant__0", "quant__1"))
    sums = np.arange(112 * 112 * levels(source)[0], 112 * 112 * levels(source)[-1] + 1)
    positions = sums * (source.grid()[2] / 112**2) / pooled.grid()[0]
    inside = (positions > levels(pooled)[0]) & (positions < levels(pooled)[-1])
    assert distance(positions[inside]) > 1e-6


class SideBySide(nn.Module):
    """A concatenation of codes of two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x).relu(), self.other(x).relu()
        return self.last(torch.cat([one, one + other], 1)).flatten(1)


@pytest.mark.parametrize("part", ["quant_relu", "quant_add"])
def test_parts_side_by_side_are_rounded_alike(part: str) -> None:
    torch.manual_seed(0)
    student = quantize(SideBySide().eval(), example=SHAPE)
    calibrate(student, images())
    source, total = quantizer_at(student, part), quantizer_at(student, "quant_cat")

    def nearest() -> float:
        return distance(levels(source) * source.grid()[2] / total.grid()[0])

    with torch.no_grad():
        total.step.copy_(torch.tensor(37 * source.grid()[2] / 6.5))
    before = nearest()
    off_borders(student)
    assert before < 1e-6 < nearest()


class Resized(nn.Module):
    """Codes between which others are interpolated."""

    def __init__(self, factor: float, align_corners: bool) -> None:
        super().__init__()
        self.one, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.factor, self.align_corners = factor, align_corners

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.one(x).relu())).flatten(1)

    def between(self, x: Tensor) -> Tensor:
        return F.interpolate(
            x, scale_factor=self.factor, mode="bilinear", align_corners=self.align_corners
        )


@pytest.mark.parametrize(("factor", "steps"), [(2, 1.0), (4, 1.0), (3, 2 / 3)])
def test_interpolated_codes_are_off(factor: float, steps: float) -> None:
    """Where both sides have one step, every sixteenth lies on a border."""
    torch.manual_seed(0)
    model = Resized(factor, False).eval()
    student = quantize(model, example=SHAPE)
    calibrate(student, images())
    source, total = (quantizer_at(student, n) for n in ("quant_relu", "quant_interpolate"))
    random = np.random.default_rng(0)
    codes = torch.from_numpy(random.choice(levels(source), (64, 4, 8, 8)).astype(np.float64))
    reals = model.between(codes).numpy() * source.grid()[2]
    with torch.no_grad():
        total.step.copy_(torch.tensor(steps * source.grid()[2]))
    before = distance(reals / total.grid()[0])
    assert off_borders(student) == ()
    assert before < 1e-6 < distance(reals / total.grid()[0])


class Pooled(nn.Module):
    """Codes that windows average."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.one, self.pool, self.last = nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.one(x).relu())).flatten(1)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, stride=2, ceil_mode=True),
        nn.AvgPool2d(2, stride=1, padding=1),
        nn.AvgPool2d((2, 3), stride=1, padding=1, count_include_pad=False),
    ],
    ids=str,
)
def test_means_of_windows_are_off(pool: nn.Module) -> None:
    """Those that are cut short at the edge as well, which divide by what is left."""
    torch.manual_seed(0)
    student = quantize(Pooled(pool).eval(), example=SHAPE)
    calibrate(student, images())
    source, total = (quantizer_at(student, n) for n in ("quant_relu", "quant_pool"))
    random = np.random.default_rng(0)
    codes = torch.from_numpy(random.choice(levels(source), (64, 4, 8, 8)).astype(np.float64))
    reals = pool(codes).numpy() * source.grid()[2]
    with torch.no_grad():
        total.step.copy_(torch.tensor(source.grid()[2]))
    before = distance(reals / total.grid()[0])
    assert off_borders(student) == ()
    assert before < 1e-6 < distance(reals / total.grid()[0])


def test_of_large_windows_whole_ones_are_looked_at() -> None:
    """Those cut short have dozens of sizes: no step is free of all, and each is tried for long."""
    pools = {size: nn.AvgPool2d(size, stride=2, ceil_mode=True) for size in (4, 5)}
    kinds = {}
    for size, pool in pools.items():
        student = quantize(Pooled(pool).eval(), example=SHAPE)
        calibrate(student, images())
        kinds[size] = type(_Walk(student, lower(student)).met("pool"))
    assert kinds == {4: Several, 5: Mean}


@pytest.mark.parametrize(("factor", "align_corners"), [(2.0, True), (1.7, False)])
def test_codes_of_many_parts_are_left(factor: float, align_corners: bool) -> None:
    student = quantize(Resized(factor, align_corners).eval(), example=SHAPE)
    calibrate(student, images())
    before = grids(student)
    off_borders(student)
    assert grids(student)["quant_interpolate"] == before["quant_interpolate"]


def test_a_limit_that_holds_the_step_is_no_loop() -> None:
    quantizer = METHODS["lsq"].activation(8, False, limit=6.0)
    quantizer.observe(torch.rand(4, 3, 8, 8) * 30)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    (step, _, _) = quantizer.grid()
    assert step == pytest.approx(6 / 255)
    met = Met(np.array([20.5 * step]), np.zeros(1))
    with torch.no_grad():
        assert _moved(quantizer, met) < 1.0
    assert quantizer.grid()[0] == step
    assert quantizer.step.item() == 1.0


def test_what_is_cut_has_no_border() -> None:
    met = Met(np.array([-3.5, 14.5, 15.5, 300.5]), np.zeros(4))
    assert met.margin(1.0, 0, 15) == 0.0
    assert Met(met.values[[0, 2, 3]], np.zeros(3)).margin(1.0, 0, 15) == np.inf
    assert met.cut(0.0, 6.0).values.tolist() == [0.0, 6.0]  # what is cut is a bound
    assert met.cut(0.0, None).values.tolist() == [14.5, 15.5, 300.5, 0.0]
    assert met.cut(-float("inf"), None).values.tolist() == met.values.tolist()
    assert met.cut(0.0, 6.5).margin(1.0, 0, 15) == 0.0


def test_students_without_integers_stay_as_they_are() -> None:
    formless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.CELU(), nn.Flatten(), nn.Linear(144, CLASSES))
    student = quantize(formless.eval(), QuantSpec(exclude=("1",)), example=SHAPE)
    calibrate(student, images())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert off_borders(student) == ()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_the_rest_of_a_student_stays() -> None:
    student = quantize(network("residual"), example=SHAPE)
    calibrate(student, images())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    off_borders(student)
    changed = {k for k, value in student.state_dict().items() if not torch.equal(value, before[k])}
    assert all("quant" in key and key.endswith("step") for key in changed)

"""Nothing depends on how images are cut into batches, or on how the training was launched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from networks import SHAPE, images
from torch import Tensor, nn

from sqakd_deploy.models import build_model
from sqakd_deploy.quantization import (
    activation_quantizers,
    batch_norms,
    calibrate,
    quantize,
    reestimate_batch_norm,
)
from sqakd_deploy.quantizers.ranges import search_step
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.training.features import _last_inner_input
from sqakd_deploy.training.fitting import Fit
from sqakd_deploy.training.hessian import update_deltas
from sqakd_deploy.training.losses import label_loss
from sqakd_deploy.training.processes import start


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 6 * 6, 5)
    ).eval()


def test_statistics_of_batches_count_by_their_images() -> None:
    net, batch = small_net(), images(34) + torch.arange(34.0).reshape(-1, 1, 1, 1)
    reestimate_batch_norm(net, [batch[:32], batch[32:]])
    (norm,) = batch_norms(net)
    wanted = net[0](batch).mean((0, 2, 3))
    assert torch.allclose(norm.running_mean, wanted, rtol=1e-5)
    assert norm.momentum == 0.1


def test_ranges_of_batches_count_by_their_images() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5)).eval()
    large, small = images(30), 9 * images(2, seed=1)

    def step_of(*batches: Tensor) -> float:
        student = quantize(net, example=SHAPE)
        calibrate(student, batches)
        return next(iter(activation_quantizers(student).values())).grid()[0]

    each = step_of(large), step_of(small)
    found = step_of(large, small)
    assert found == pytest.approx((30 * each[0] + 2 * each[1]) / 32, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_step_may_reach_the_farthest_weight_on_either_side(bits: int) -> None:
    """The best of many steps is hardly better, whichever side the farthest weight is on."""
    high = 2 ** (bits - 1) - 1
    rows = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    found = search_step(rows, -high - 1, high, 0.0)

    def error(step: Tensor) -> Tensor:
        codes = torch.round(rows / step[:, None]).clamp(-high - 1, high)
        return ((codes * step[:, None] - rows) ** 2).mean(1)

    reach = torch.maximum(rows.amax(1) / high, -rows.amin(1) / (high + 1))
    best = torch.stack([error(reach * f) for f in torch.linspace(0.05, 1.0, 1000)]).amin(0)
    assert float((error(found) / best).mean()) < 1.08
    assert torch.equal(search_step(torch.tensor([[1.0, -1.0]]), -2, 1, 0.0), torch.tensor([1.0]))


@pytest.fixture
def _own_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_own_state")
def test_settings_of_a_launcher_are_not_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = start(torch.device("cpu"))
    layer = accelerator.prepare_model(nn.Linear(3, 2))
    result = layer(torch.ones(1, 3))
    assert result.dtype == torch.float32
    accelerator.backward(result.sum())
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))


def test_processes_draw_their_own_dropout_masks() -> None:
    def mask(process: int, step: int) -> Tensor:
        torch.manual_seed(7)
        fit: Any = SimpleNamespace(accelerator=SimpleNamespace(process_index=process), _seed=7)
        Fit._separate_masks(fit, step)
        return torch.rand(100)

    torch.manual_seed(7)
    assert torch.equal(torch.rand(100), mask(0, 3))  # the one that is saved goes on
    assert torch.equal(mask(1, 3), mask(1, 3))
    assert not torch.equal(mask(0, 3), mask(1, 3))
    assert not torch.equal(mask(1, 3), mask(2, 3))
    assert not torch.equal(mask(1, 3), mask(1, 4))


def test_curvature_is_that_of_the_loss_trained_with() -> None:
    net = small_net()
    side = TensorSpec(method="ewgs", bits=2)
    student = quantize(net, QuantSpec(weights=side, activations=side), example=SHAPE)
    batch = images(16)
    calibrate(student, batch)
    labels = torch.arange(16) % 5

    def supervised(logits: Tensor, target: Tensor, given: Any) -> Tensor:
        assert not torch.equal(logits, target)
        return label_loss(logits, given[1])[0]

    plain = update_deltas(student, net, [(batch, labels)], temperature=4.0)
    other = update_deltas(student, net, [(batch, labels)], temperature=4.0, divergence=supervised)
    assert plain.keys() == other.keys()
    assert plain != other


@pytest.mark.parametrize("bits", [4, 8])
def test_features_are_tapped_before_the_last_inner_layer(bits: int) -> None:
    side = TensorSpec(bits=bits)
    net = build_model("resnet20", num_classes=5).eval()
    student = quantize(net, QuantSpec(weights=side, activations=side), example=(3, 32, 32))
    source, quantizer = _last_inner_input(student)
    assert source.meta["tensor_meta"].shape[1:] == (64, 8, 8)
    assert quantizer.bits == bits

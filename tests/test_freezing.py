"""BatchNorm's statistics freeze where asked; training then computes what inference does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from networks import SHAPE, images, network
from torch import Tensor, nn

from sqakd_deploy.errors import SpecError
from sqakd_deploy.quantization import batch_norms, quantize, reestimate_batch_norm
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.distillation import distill, frozen_epochs
from sqakd_deploy.training.fitting import Step
from sqakd_deploy.training.optimizers import parameter_groups
from sqakd_deploy.training.saves import Saves

BATCHES = list(images(64).split(16))


def statistics(student: nn.Module) -> Tensor:
    """All running means and variances, in a row."""
    return torch.cat([torch.cat([n.running_mean, n.running_var]) for n in batch_norms(student)])  # type: ignore[list-item]


def watched(
    after: float,
    epochs: int = 4,
    saves: Saves | None = None,
    watch: Callable[[nn.Module, Step], None] = lambda student, step: None,
) -> tuple[nn.Module, list[Tensor]]:
    """A trained student, and the statistics behind each step."""
    teacher = network("residual")
    student = quantize(teacher, example=SHAPE)
    seen: list[Tensor] = []

    def on_step(step: Step) -> None:
        seen.append(statistics(student))
        watch(student, step)

    config = DistillConfig(
        epochs=epochs, batch_size=16, lr=1e-2, freeze_bn_after=after, bn_images=64
    )
    distill(student, BATCHES, teacher=teacher, config=config, saves=saves, on_step=on_step)
    return student, seen


def changes(seen: list[Tensor]) -> list[bool]:
    """Whether the statistics behind each step but the first are others than before it."""
    return [not torch.equal(a, b) for a, b in pairwise(seen)]


@pytest.mark.parametrize(("after", "moving"), [(0.0, 0), (0.5, 2), (0.6, 2), (0.7, 3), (1.0, 4)])
def test_statistics_move_until_they_freeze(after: float, moving: int) -> None:
    student, seen = watched(after)
    steps = len(BATCHES)
    still = max(0, (4 - moving) * steps - 1)
    expected = [True] * (4 * steps - 1 - still) + [False] * still
    assert changes(seen) == expected
    final = statistics(student)
    assert torch.equal(final, seen[-1]) == (moving < 4)  # else re-estimated at the end


def test_they_freeze_at_those_of_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[Tensor] = []

    def spy(student: nn.Module, batches: object) -> None:
        reestimate_batch_norm(student, batches)  # type: ignore[arg-type]
        frozen.append(statistics(student))

    monkeypatch.setattr("sqakd_deploy.training.distillation.reestimate_batch_norm", spy)
    _, seen = watched(0.5)
    (once,) = frozen
    assert torch.equal(seen[2 * len(BATCHES)], once)
    assert not torch.equal(seen[2 * len(BATCHES) - 1], once)


def test_frozen_training_computes_what_inference_does() -> None:
    same: list[bool] = []

    def compare(student: nn.Module, step: Step) -> None:
        with torch.no_grad():
            trained = student(BATCHES[0])
            for norm in batch_norms(student):
                assert norm.training == (step.epoch < 2)
            modes = {module: module.training for module in student.modules()}
            inferred = student.eval()(BATCHES[0])
            for module, mode in modes.items():
                module.training = mode
        same.append(torch.equal(trained, inferred))

    watched(0.5, watch=compare)
    steps = len(BATCHES)
    assert same == [False] * 2 * steps + [True] * 2 * steps


@pytest.mark.parametrize("stop", [1, 7, 8, 11])
def test_a_run_resumed_while_frozen_ends_the_same(stop: int, tmp_path: Path) -> None:
    def interrupt(student: nn.Module, step: Step) -> None:
        if step.epoch * step.steps + step.step == stop:
            raise KeyboardInterrupt

    always = Saves(tmp_path, 0.0)
    with pytest.raises(KeyboardInterrupt):
        watched(0.5, saves=always, watch=interrupt)
    resumed, _ = watched(0.5, saves=always)
    whole, _ = watched(0.5)
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "activations", "first_last", "after", "expected"),
    [(4, 4, 8, None, 10), (8, 8, 8, None, 10), (3, 4, 8, None, 0), (4, 2, 8, None, 0),
     (4, 4, 1, None, 0), (4, 4, 8, 0.7, 3), (2, 2, 8, 0.0, 10), (8, 8, 8, 1.0, 0)],
)  # fmt: skip
def test_how_many_epochs_are_frozen(
    weights: int, activations: int, first_last: int, after: float | None, expected: int
) -> None:
    spec = QuantSpec(
        weights=TensorSpec(bits=weights),
        activations=TensorSpec(bits=activations),
        first_last_bits=first_last,
    )
    student = quantize(network("residual"), spec, example=SHAPE)
    for epochs, frozen in ((10, expected), (0, 0)):
        config = DistillConfig(epochs=epochs, freeze_bn_after=after)
        assert frozen_epochs(student, config) == frozen


@pytest.mark.parametrize(
    ("bits", "asked", "expected"),
    [(4, None, 3e-4), (8, None, 3e-4), (3, None, 1e-3), (4, 0.1, 0.1)],
)
def test_how_fast_it_learns(bits: int, asked: float | None, expected: float) -> None:
    side = TensorSpec(bits=bits)
    student = quantize(
        network("residual"), QuantSpec(weights=side, activations=side), example=SHAPE
    )
    model, own = parameter_groups(student, DistillConfig(lr=asked))[:2]
    assert (model["lr"], own["lr"]) == (expected, 1e-4)


def test_shares_are_shares() -> None:
    with pytest.raises(SpecError, match="freeze_bn_after"):
        DistillConfig.parse({"freeze_bn_after": 1.5})

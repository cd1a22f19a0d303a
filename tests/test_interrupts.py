"""Ctrl-C finishes the step and saves; pressed again it stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import SHAPE, images, network
from torch import nn

from sqakd_deploy.quantization import quantize
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.fitting import Step
from sqakd_deploy.training.interrupts import held_interrupts
from sqakd_deploy.training.saves import Saves

CONFIG = DistillConfig(epochs=2, batch_size=16, seed=1)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """As at a terminal; a shell has what it puts into the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(saves: Saves | None, presses: dict[int, int]) -> nn.Module:
    """Distil; ``presses`` tells at which steps, from 0, Ctrl-C is pressed how often."""
    teacher = network("mixed")
    student = quantize(teacher, example=SHAPE)
    torch.manual_seed(11)

    def press(step: Step) -> None:
        for _ in range(presses.get(step.epoch * step.steps + step.step, 0)):
            signal.raise_signal(signal.SIGINT)

    batches = list(images(64).split(16))
    distill(student, batches, teacher=teacher, config=CONFIG, saves=saves, on_step=press)
    return student


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("save-*"))


@pytest.mark.parametrize("step", [0, 2, 3, 7])
def test_an_interrupted_run_loses_no_step(
    step: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rarely = Saves(tmp_path, 3600.0)
    with pytest.raises(KeyboardInterrupt):
        run(rarely, {step: 1})
    assert "stopping after this step" in capfd.readouterr().err
    assert saved(tmp_path) == [f"save-{step + 1:09}"]
    resumed, whole = run(rarely, {}), run(None, {})
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pressed_twice_it_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Saves(tmp_path, 3600.0), {1: 2})
    assert not saved(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_someone_elses_handler_stays(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        run(Saves(tmp_path, 3600.0), {1: 1})
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
    assert not saved(tmp_path)


def test_other_threads_handle_no_signals() -> None:
    pressed: list[bool] = []

    def work() -> None:
        with held_interrupts() as interrupted:
            pressed.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert pressed == [False]

"""Figures of a training that cannot be written cost the figures alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sqakd_deploy.checkpoint import METRICS, Run
from sqakd_deploy.config import RunConfig
from sqakd_deploy.listening import Listener
from sqakd_deploy.training.curves import Curves
from sqakd_deploy.training.fitting import Epoch, Step
from sqakd_deploy.training.watch import Watch

STEP = Step(0, 0, 1, 4, 0.5, 90.0, 1e-3, 100.0)
EPOCH = Epoch(1, 0.5, 90.0, 1e-3, 1.0)


class Heard(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_curves_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    heard = Heard()
    run = Run(tmp_path, RunConfig(tensorboard=True))

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with Watch(heard, run, "student") as watch:
        monkeypatch.setattr(Curves, "add", full)
        watch.on_step(STEP)
        watch.on_step(replace(STEP, step=1))
    (message,) = heard.messages
    assert message.startswith("could not write curves for TensorBoard: [Errno 28]")


@pytest.mark.parametrize("damaged", ["garbage{", "[]", '{"epoch": 1}'])
def test_a_damaged_line_of_metrics(damaged: str, tmp_path: Path) -> None:
    heard = Heard()
    (tmp_path / METRICS).write_text(damaged + "\n")
    with Watch(heard, Run(tmp_path, RunConfig()), "student") as watch:
        watch.on_epoch(EPOCH)
    (message,) = heard.messages
    assert message.startswith(f"could not write {METRICS}: ")
    assert (tmp_path / METRICS).read_text() == damaged + "\n"  # nothing of old is lost


def test_an_epoch_is_a_line(tmp_path: Path) -> None:
    with Watch(Heard(), Run(tmp_path, RunConfig()), "student") as watch:
        watch.on_epoch(EPOCH)
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line)["part"] == "student"

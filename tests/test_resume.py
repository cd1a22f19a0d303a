"""A run that was killed ends with the weights of one that was not."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from networks import SHAPE, images, network
from small_network import SMALL
from torch import nn

from sqakd_deploy.checkpoint import open_run
from sqakd_deploy.cli import main
from sqakd_deploy.config import RunConfig
from sqakd_deploy.quantization import quantize
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.fitting import Epoch, Step
from sqakd_deploy.training.saves import Position, Saves
from sqakd_deploy.training.train import train

COMMAND = [sys.executable, "-m", "sqakd_deploy", "train"]
SETTINGS = ["--bits", "2", "--method", "ewgs", "--epochs", "4", "--teacher-epochs", "3"]
SETTINGS += ["--save-every", "0", "--compile", "off", "--delta", "hessian"]
STEPS = (4 + 3) * 11  # of both trainings


def finish(*arguments: str) -> None:
    """Train in this process, which takes no seconds to start."""
    done = CliRunner().invoke(main, ["train", *arguments])
    assert done.exit_code == 0, done.output


def saves_of(folder: Path) -> set[Path]:
    return set(folder.glob("last/*/save-*"))


def kill_after_some_saves(folder: Path, saves: int, arguments: list[str]) -> None:
    """SIGKILL once so many new training states were seen: it hits training, at no chosen step."""
    known, seen = saves_of(folder), set[Path]()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: tests/conftest.py
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    try:
        while len(seen) < saves and process.poll() is None and time.monotonic() < deadline:
            seen |= saves_of(folder) - known
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def check_kills(tmp_path: Path, kills: int, seed: int, model: str = "resnet20") -> None:
    often = tmp_path / "often.yaml"
    often.write_text("distillation: {delta_every: 1}\n")
    settings = [*SETTINGS, "--config", str(often), "--model", model]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(*settings, "--output", str(whole))
    chance = random.Random(seed)
    arguments = [*settings, "--output", str(broken)]
    for _ in range(kills):
        kill_after_some_saves(broken, chance.randint(1, STEPS // kills - 3), arguments)
        assert open_run(broken).status == "running"
        assert saves_of(broken)
        arguments = ["--resume", str(broken)]
    finish("--resume", str(broken))
    for file in ("teacher.safetensors", "student.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    epochs = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(epochs, expected, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    assert not (broken / "last").exists()


def test_killed_twice_and_resumed(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=2, seed=5, model=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_five_times_and_resumed(tmp_path: Path, seed: int) -> None:
    check_kills(tmp_path, kills=5, seed=seed)


# -- in one process ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


CONFIG = DistillConfig(epochs=3, batch_size=16, seed=1)


# bfloat16 lays weights out channels last.
BF16 = CONFIG.model_copy(update={"precision": "bf16"})
SGD = CONFIG.model_copy(update={"optimizer": "sgd", "nesterov": True, "warmup_steps": 5})


def run(
    folder: Path | None,
    stop_at: int | None = None,
    seconds: float = 0.0,
    config: DistillConfig = CONFIG,
    epochs: list[Epoch] | None = None,
    batches: torch.Tensor | Epochs | None = None,
) -> nn.Module:
    """Distil; every call starts from the same fresh student, as a new process does."""
    teacher = network("mixed")  # has dropout, so that torch's generator counts
    student = quantize(teacher, example=SHAPE)
    torch.manual_seed(11)

    def watch(step: Step) -> None:
        if stop_at is not None and step.epoch * step.steps + step.step == stop_at:
            raise Killed

    saves = None if folder is None else Saves(folder, seconds)
    data = Epochs() if batches is None else batches
    records = distill(student, data, teacher=teacher, config=config, saves=saves, on_step=watch)
    if epochs is not None:
        epochs += [dataclasses.replace(record, seconds=0.0) for record in records]
    return student


class Epochs:
    """Batches whose order depends on the epoch alone."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self):  # type: ignore[no-untyped-def]
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch))
        return iter(images(64)[order].split(16))


@cache
def whole(config: DistillConfig = CONFIG) -> tuple[nn.Module, list[Epoch]]:
    """What a run that nobody killed gives; made once."""
    epochs: list[Epoch] = []
    return run(None, config=config, epochs=epochs), epochs


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(values(first), values(second), strict=True))


def values(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7, 11])
def test_resumed_at_any_step_the_result_is_the_same(stop_at: int, tmp_path: Path) -> None:
    resumed: list[Epoch] = []
    with pytest.raises(Killed):
        run(tmp_path, stop_at)
    student, epochs = whole()
    assert same(run(tmp_path, epochs=resumed), student)
    assert resumed == epochs[-len(resumed) :]


@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_sgd_with_a_warm_up_resumes_as_exactly(stop_at: int, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, stop_at, config=SGD)
    assert same(run(tmp_path, config=SGD), whole(SGD)[0])
    assert not same(whole(SGD)[0], whole()[0])


@pytest.mark.parametrize("stop_at", [1, 6])
def test_channels_last_weights_resume_as_exactly(stop_at: int, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, stop_at, config=BF16)
    resumed = run(tmp_path, config=BF16)
    weights = [value for value in values(resumed) if value.ndim == 4 and value.shape[2] > 1]
    assert not all(weight.is_contiguous() for weight in weights)
    assert same(resumed, whole(BF16)[0])


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_tensor_of_images_resumes_as_exactly(stop_at: int, tmp_path: Path) -> None:
    batches = images(64)
    with pytest.raises(Killed):
        run(tmp_path, stop_at, batches=batches)
    assert same(run(tmp_path, batches=batches), run(None, batches=batches))


def test_a_run_killed_between_teacher_and_student_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "model": {"name": SMALL},
        "teacher": {"epochs": 1},
        "distillation": {"epochs": 0, "precision": "bf16"},  # which lays out channels last
    }
    config = RunConfig.parse(settings)
    unbroken = train(config, output=tmp_path / "whole").run

    def kill(*arguments: object, **others: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("sqakd_deploy.training.train.distill", kill)
        with pytest.raises(Killed):
            train(config, output=tmp_path / "broken")
    broken = train(resume=tmp_path / "broken").run
    for file in ("teacher.safetensors", "student.safetensors"):
        assert (unbroken / file).read_bytes() == (broken / file).read_bytes()


def newest(folder: Path) -> Path:
    return sorted(folder.glob("save-*"))[-1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "position.json"])
def test_a_damaged_save_falls_back_to_the_one_before(file: str, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, 7)
    assert len(list(tmp_path.glob("save-*"))) == 2
    damaged = newest(tmp_path) / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(bytes(content))
    said: list[str] = []
    teacher = network("mixed")
    student = quantize(teacher, example=SHAPE)
    torch.manual_seed(11)
    saves = Saves(tmp_path, 0.0, said.append)
    distill(student, Epochs(), teacher=teacher, config=CONFIG, saves=saves)
    assert any("is damaged" in text and "going back to the one before" in text for text in said)
    assert same(student, whole()[0])


def test_a_save_cut_short_is_never_seen(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, 5)
    partial = tmp_path / ".save-000000999.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert same(run(tmp_path), whole()[0])


def test_a_full_disk_costs_one_save_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = nn.Linear(2, 2), []
    optimizer = torch.optim.Adam(model.parameters())
    saves = Saves(tmp_path, 0.0, said.append)
    saves.write(1, Position(step=1), model, optimizer)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sqakd_deploy.training.saves.save_file", full)
    saves.write(2, Position(step=2), model, optimizer)
    assert said == [
        f"could not save to {tmp_path / 'save-000000002'}: [Errno 28] No space left on device; "
        "the save before it is kept"
    ]
    assert saves.restore(model, optimizer) == Position(step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["save-000000001"]


@pytest.mark.parametrize(("before", "now"), [(2, 3), (1, 2)])
def test_a_save_of_another_width_is_of_another_model(before: int, now: int, tmp_path: Path) -> None:
    """A row can be copied to each of two, which nobody would see."""
    models, said = (nn.Linear(2, before), nn.Linear(2, now)), list[str]()
    saves = Saves(tmp_path, 0.0, said.append)
    saves.write(1, Position(step=1), models[0], torch.optim.Adam(models[0].parameters()))
    kept = [parameter.detach().clone() for parameter in models[1].parameters()]
    assert saves.restore(models[1], torch.optim.Adam(models[1].parameters())) is None
    assert said == [
        f"{tmp_path / 'save-000000001'} is damaged (it belongs to another model); going back to "
        "the one before it"
    ]
    assert all(map(torch.equal, kept, models[1].parameters()))

"""A student with an excluded operator that has no integer form trains, is kept, and is no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from networks import CLASSES, SHAPE, images
from torch import nn

import sqakd_deploy
from sqakd_deploy.api import export, verify
from sqakd_deploy.checkpoint import STUDENT, open_run
from sqakd_deploy.cli import main
from sqakd_deploy.config import RunConfig
from sqakd_deploy.errors import ExportError
from sqakd_deploy.listening import Listener
from sqakd_deploy.lowering.integer import snap_biases
from sqakd_deploy.lowering.lowerable import without_form
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import DistillConfig, QuantSpec
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.train import train

NETWORK = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.CELU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""
SAID = "layer '1' (CELU) has no integer form: the student cannot be exported"
REFUSED = r"layer '1' \(CELU\) has no integer form, so that its student stays in PyTorch; replace"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def teacher() -> nn.Module:
    shape = (SHAPE[0], 4, 3)
    return nn.Sequential(
        nn.Conv2d(*shape), nn.CELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    ).eval()


def test_it_is_distilled_and_told_of_once(tmp_path: Path) -> None:
    model, said = teacher(), list[str]()
    student = quantize(model, QuantSpec(exclude=("1",)), example=SHAPE)
    config = DistillConfig(epochs=2, batch_size=16)
    records = distill(student, images(64), teacher=model, config=config, message=said.append)
    assert len(records) == 2
    assert [text for text in said if "integer form" in text] == [
        f"{SAID}, and its biases stay as trained"
    ]
    with torch.no_grad():
        assert torch.isfinite(student(images(4))).all()
    with pytest.raises(ExportError, match=REFUSED):
        export(student, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_its_biases_have_no_grid() -> None:
    student = quantize(teacher(), QuantSpec(exclude=("1",)), example=SHAPE)
    sqakd_deploy.calibrate(student, images())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    snap_biases(student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_what_is_excluded_but_has_a_form_does_not_count() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, CLASSES))
    for exclude in ((), ("0", "1"), ("*",)):
        student = quantize(plain, QuantSpec(exclude=exclude), example=SHAPE)
        assert without_form(student) is None


def test_its_run_is_complete_and_its_export_refused(tmp_path: Path) -> None:
    quick = ("--teacher-epochs", "1", "--epochs", "1", "--output", "r")
    trained = run("train", "--model", "net.py:make", "--exclude", "1", *quick)
    assert trained.exit_code == 0, trained.output
    assert trained.stderr.count("has no integer form") == 1
    assert "student–teacher agreement" in trained.stdout
    found = open_run(tmp_path / "r")
    assert found.status == "complete"
    parameters = (9 + 1) * 8 + (9 * 8 + 1) * 8 + (8 + 1) * 10
    assert found.facts["results"]["float_size"] == 4 * parameters
    ends, inner = 9 * 8 + 8 * 10, 9 * 8 * 8  # weights at 8 and at 4 bits
    biases = 4 * (parameters - ends - inner)
    assert found.facts["results"]["file_size"] == ends + inner + biases
    assert found.facts["results"]["information_size"] == ends + inner // 2 + biases
    assert run("eval", "r").exit_code == 0
    exported = run("export", "model.onnx", "--run", "r")
    assert exported.exit_code == 7, exported.output
    assert "layer '1' (CELU) has no integer form" in exported.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*.onnx"))


class _Stops(Listener):
    """Ctrl-C in the second epoch of the student's training."""

    def __init__(self) -> None:
        self.task, self.said = "", list[str]()

    def message(self, text: str) -> None:
        self.said.append(text)

    def start(self, task: str, total: int) -> None:
        self.task, self.total = task, total

    def advance(self, done: int, step: object = None) -> None:
        if self.task == "student" and done > self.total / 2:
            raise KeyboardInterrupt


def test_its_run_can_be_interrupted_and_resumed(tmp_path: Path) -> None:
    config = RunConfig.parse(
        {
            "model": {"name": "net.py:make"},
            "quantization": {"exclude": ["1"]},
            "teacher": {"epochs": 1},
            "distillation": {"epochs": 2, "save_seconds": 0, "compile": "off"},
        }
    )
    train(config, output=tmp_path / "whole")
    stops = _Stops()
    with pytest.raises(KeyboardInterrupt):
        train(config, output=tmp_path / "stopped", listener=stops)
    stopped = tmp_path / "stopped" / STUDENT
    assert open_run(tmp_path / "stopped").status == "interrupted"
    assert stopped.exists()
    assert "go on with --resume" in stops.said[-1]
    assert "export it" not in stops.said[-1]
    resumed = run("train", "--resume", str(tmp_path / "stopped"), "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["agreement"] >= 0
    assert stopped.read_bytes() == (tmp_path / "whole" / STUDENT).read_bytes()


@pytest.mark.parametrize(
    "spec", [QuantSpec(exclude=("0",)), QuantSpec(placement="paper")], ids=["excluded", "paper"]
)
def test_a_layer_in_float_keeps_its_padding(spec: QuantSpec, tmp_path: Path) -> None:
    """It was written as if it padded with zeros, and the proof might not see it."""
    model = teacher()
    model[0] = nn.Conv2d(SHAPE[0], 4, 3, padding=1, padding_mode="circular")
    model[1] = nn.ReLU()
    student = quantize(model, spec, example=SHAPE)
    calibrate(student, images(64))
    assert without_form(student) is None
    verify(export(student, tmp_path / "model.onnx"), student, images(64)).raise_for_failures()

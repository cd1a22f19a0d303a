from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from networks import SHAPE, images, network
from safetensors.torch import load_file, save_file
from torch import nn

from sqakd_deploy import files
from sqakd_deploy.checkpoint import (
    STUDENT,
    STUDENT_KEY,
    create_run,
    load_weights,
    new_folder,
    newest_run,
    open_run,
    own_run,
    save_weights,
)
from sqakd_deploy.config import RunConfig
from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec, TensorSpec


def student(method: str = "lsq") -> nn.Module:
    side = TensorSpec(method=method, bits=3)
    made = quantize(network("residual"), QuantSpec(weights=side, activations=side), example=SHAPE)
    calibrate(made, images())
    return made


@pytest.mark.parametrize("method", ["ste", "pact", "lsq", "dorefa", "ewgs"])
def test_a_student_reads_back_bit_for_bit(method: str, tmp_path: Path) -> None:
    saved = student(method)
    save_weights(saved, tmp_path / STUDENT)
    side = TensorSpec(method=method, bits=3)
    fresh = quantize(
        network("residual", seed=9), QuantSpec(weights=side, activations=side), example=SHAPE
    )
    load_weights(fresh, tmp_path / STUDENT)
    with torch.no_grad():
        assert torch.equal(fresh(images()), saved(images()))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / STUDENT
    save_weights(student(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"student\.safetensors is truncated or no safe"):
        load_weights(student(), path)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / STUDENT
    state = load_file(_saved(path))
    state["conv1.weight"] = torch.zeros(2, 2)
    state["extra"] = torch.zeros(1)
    del state["stem.weight"]
    save_file(state, path)
    model = student()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="belongs to another model") as error:
        load_weights(model, path)
    for problem in ("missing stem.weight", "unexpected extra", r"conv1.weight is (2, 2), wanted"):
        assert problem in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def _saved(path: Path) -> Path:
    save_weights(student(), path)
    return path


def test_a_run_folder_keeps_its_config_and_facts(tmp_path: Path) -> None:
    config = RunConfig.parse({"quantization": {"weights": {"bits": 2}}})
    run = create_run(config, tmp_path / "run")
    run.update(results={"top1": 98.5})
    again = open_run(tmp_path / "run")
    assert again.config == config
    assert again.status == "running"
    assert again.facts["results"] == {"top1": 98.5}


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    create_run(RunConfig(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="already holds a run: choose another --output"):
        create_run(RunConfig(), tmp_path / "run")


def test_of_two_starts_at_once_in_a_folder_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins its run when this one has seen that there is none."""
    mkdir, others = Path.mkdir, list[Path]()
    theirs = RunConfig.parse({"distillation": {"seed": 1}})

    def meanwhile(path: Path, *arguments: int, **options: bool) -> None:
        mkdir(path, *arguments, **options)
        if not others:
            others.append(path)
            create_run(theirs, path)

    monkeypatch.setattr(Path, "mkdir", meanwhile)
    with pytest.raises(CheckpointError, match="already holds a run: choose another --output"):
        create_run(RunConfig(), tmp_path / "run")
    assert open_run(tmp_path / "run").config == theirs


def test_a_run_may_begin_in_a_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one could not: it leaves nothing that would be taken for a run."""

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sqakd_deploy.files.write_text", full)
        with pytest.raises(CheckpointError, match=r"cannot write the run folder .*No space left"):
            create_run(RunConfig(), tmp_path)
    create_run(RunConfig(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write the run folder .*File exists"):
        create_run(RunConfig(), tmp_path / "file")


def test_the_next_free_name_is_taken(tmp_path: Path) -> None:
    names = [new_folder(tmp_path / "run").name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


def test_of_two_starts_at_once_each_has_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one makes its folder when this one is about to."""
    monkeypatch.chdir(tmp_path)
    mkdir, others = Path.mkdir, list[Path]()

    def meanwhile(path: Path, *arguments: int, **options: bool) -> None:
        if path.parent.name == "runs" and not others:
            others.append(path)
            mkdir(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", meanwhile)
    run = create_run(RunConfig(), None)
    assert [path.name for path in (*others, run.path)] == [
        "digits-resnet20-w4a4-lsq",
        "digits-resnet20-w4a4-lsq-2",
    ]


def test_relative_paths_mean_what_they_meant_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder that a run is opened from has files of the same names."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "photos", here / "kept", here / "digits", elsewhere / "photos"):
        folder.mkdir(parents=True)
    for file in (here / "net.py", here / "net.pt", elsewhere / "net.py", elsewhere / "gone.pt"):
        file.touch()
    monkeypatch.chdir(here)
    model = {"name": "net.py:make", "weights": "net.pt"}
    own = RunConfig.parse({"model": model, "data": {"source": "photos", "cache": "kept"}})
    known = RunConfig.parse({"model": {"weights": "gone.pt"}, "data": {"source": "digits"}})
    folders = RunConfig.parse({"data": {"source": "./digits", "cache": False}})
    configs = {"own": own, "known": known, "folders": folders}
    for name, config in configs.items():
        create_run(config, here / name)
        assert open_run(here / name).config == config
    monkeypatch.chdir(elsewhere)
    again = {name: open_run(here / name).config for name in configs}
    assert again["known"] == known
    assert again["own"].model.name == f"{here / 'net.py'}:make"
    assert again["own"].model.weights == str(here / "net.pt")
    assert again["own"].data.source == str(here / "photos")
    assert again["own"].data.cache == str(here / "kept")
    assert again["folders"].data.source == str(here / "digits")
    assert again["folders"].data.cache is False


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the run folder .*Not a directory"):
        create_run(RunConfig(), tmp_path / "file" / "run")


def test_the_newest_student_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run to export under .*run 'sqakd-deploy train'"):
        newest_run(tmp_path)
    for age, name in ((300, "a"), (100, "b"), (200, "c")):
        run = create_run(RunConfig(), tmp_path / name)
        (run.path / STUDENT).write_bytes(b"")
        os.utime(run.path / STUDENT, (1e9 - age, 1e9 - age))
    create_run(RunConfig(), tmp_path / "unfinished")
    assert newest_run(tmp_path).path.name == "b"


def test_a_files_own_run_is_found(tmp_path: Path) -> None:
    path = Path("m.onnx")
    for name in ("a", "b", "c"):
        (create_run(RunConfig(), tmp_path / name).path / STUDENT).write_text(name)
    said = {STUDENT_KEY: json.dumps(hashlib.sha256(b"b").hexdigest())}
    assert own_run(said, path, tmp_path).path.name == "b"
    with pytest.raises(CheckpointError, match=r"^m\.onnx does not say whose student it is; name"):
        own_run({}, path, tmp_path)
    (create_run(RunConfig(), tmp_path / "newest").path / STUDENT).mkdir()  # cannot be read
    assert own_run(said, path, tmp_path).path.name == "b"
    other = RunConfig(quantization=QuantSpec(target="qonnx"))
    (create_run(other, tmp_path / "twin").path / STUDENT).write_text("b")
    for config, name in ((other, "twin"), (RunConfig(), "b")):  # by the spec, of equal students
        spec = {"sqakd.spec": config.quantization.model_dump_json()}
        assert own_run(said | spec, path, tmp_path).path.name == name
    (tmp_path / "twin" / STUDENT).unlink()
    (tmp_path / "b" / STUDENT).write_text("trained on")
    with pytest.raises(CheckpointError, match=r"m\.onnx is the student of no run under .*--run"):
        own_run(said, path, tmp_path)


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        open_run(tmp_path)
    run = create_run(RunConfig(), tmp_path / "run")
    (run.path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run .*run is damaged"):
        open_run(run.path)


def test_a_student_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    state = load_file(_saved(tmp_path / STUDENT))
    state["conv1.weight"].view(-1)[3] = float("nan")
    save_file(state, tmp_path / STUDENT)
    with pytest.raises(CheckpointError, match=r"values that are not finite: conv1\.weight"):
        load_weights(student(), tmp_path / STUDENT)


def test_what_a_run_keeps_is_strict_json(tmp_path: Path) -> None:
    run = create_run(RunConfig(), tmp_path / "run")
    run.update(results={"divergence": float("nan"), "sizes": (1, float("inf"))})
    assert "NaN" not in (run.path / "run.json").read_text()
    assert open_run(run.path).facts["results"] == {"divergence": None, "sizes": [1, None]}


def test_a_run_without_its_facts_says_what_to_do(tmp_path: Path) -> None:
    run = create_run(RunConfig(), tmp_path / "r")
    (run.path / "run.json").unlink()
    with pytest.raises(CheckpointError) as refused:
        open_run(run.path)
    assert str(refused.value).startswith(f"{run.path}/run.json is missing, which says what")
    assert f"train anew, 'sqakd-deploy train --config {run.path}/config.yaml'" in str(refused.value)


def test_a_start_that_is_killed_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty config would be one of defaults: a run's file appears whole."""

    def killed(path: Path, text: str) -> None:
        path.write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        create_run(RunConfig(), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_system_without_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    create_run(RunConfig(), tmp_path / "run")
    assert open_run(tmp_path / "run").config == RunConfig()
    with pytest.raises(CheckpointError, match="already holds a run"):
        create_run(RunConfig(), tmp_path / "run")

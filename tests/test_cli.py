"""The command line as a person meets it: in a process of its own where start-up matters."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from small_network import SMALL

from sqakd_deploy import __version__
from sqakd_deploy.checkpoint import open_run
from sqakd_deploy.cli import main
from sqakd_deploy.config import RunConfig, load_config
from sqakd_deploy.consoles import console
from sqakd_deploy.errors import SpecError
from sqakd_deploy.parity import Tolerance
from sqakd_deploy.streams import take_any_text

QUICK = ("--epochs", "1", "--teacher-epochs", "3")
ANY = ("--model", SMALL)  # where ResNet-20 would only take longer
UNTRAINED = (*ANY, "--epochs", "0", "--teacher-epochs", "1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run, of which tests take a copy."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    assert run("train", *UNTRAINED, "--output", str(folder)).exit_code == 0
    return folder


def photos(folder: Path, count: int = 24, *, classes: tuple[str, ...] = ()) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        home = folder / classes[i % len(classes)] if classes else folder
        home.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(home / f"{i:03}.png")
    return folder


# -- the main job --------------------------------------------------------------------------------


def test_train_and_export(tmp_path: Path) -> None:
    trained = run("train", "--bits", "4", *QUICK)
    assert trained.exit_code == 0, trained.output
    assert "Labels are used for this step only." in trained.stderr
    assert "student–teacher agreement" in trained.stdout
    folder = tmp_path / "runs" / "digits-resnet20-w4a4-lsq"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "teacher.safetensors",
        "student.safetensors",
    }
    assert open_run(folder).status == "complete"
    assert load_config(folder / "config.yaml", {}).distillation.epochs == 1

    exported = run("export", "model.onnx")
    assert exported.exit_code == 0, exported.output
    assert "9 of 9 Add, 20 of 20 Conv, 1 of 1 Gemm" in exported.stdout
    assert "in float" not in exported.stdout
    assert "wrote model.onnx" in exported.stdout
    facts = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(facts["sqakd.classes"]) == list("0123456789")
    assert json.loads(facts["sqakd.preprocessing"])["input_size"] == [8, 8]


def test_training_that_harms_says_so(untrained: Path) -> None:
    """Against the student that it began with."""
    given = ("train", *ANY, "--weights", str(untrained / "teacher.safetensors"), "--epochs", "1")
    harmed = run(*given, "--lr", "1", "--output", "harmed")
    assert harmed.exit_code == 0, harmed.output
    (said,) = [line for line in harmed.stderr.splitlines() if "training ended below" in line]
    assert said.startswith("training ended below where it began: on 360 held-out images the KL")
    assert said.endswith("train longer (--epochs), or at a lower rate (--lr)")
    calibrated = run(*given[:-1], "0", "--output", "calibrated")
    helped = run(*given, "--bits", "2", "--output", "helped")
    for other in (calibrated, helped):
        assert other.exit_code == 0, other.output
        assert "training ended below" not in other.stderr


def test_the_tensorrt_profile_from_end_to_end(tmp_path: Path) -> None:
    """Every command says that nothing ran in TensorRT."""
    options = (*ANY, "--bits", "4", "--first-last-bits", "7", "--target", "tensorrt")
    trained = run("train", *options, *QUICK, "--output", "r")
    assert trained.exit_code == 0, trained.output
    assert "rules of TensorRT, and not run in it" in trained.stderr
    exported = run("export", "m.onnx", "--run", "r")
    assert exported.exit_code == 0, exported.output
    assert "not run in TensorRT; checked against 12 documented rules, all held" in exported.stdout
    assert exported.stdout.count("held") == 13
    assert "in integers:" not in exported.stdout
    refused = run("export", "other.onnx", "--run", "r", "--target", "openvino")
    assert refused.exit_code == 2
    assert "was trained for target 'tensorrt'" in refused.stderr
    told = run("export", "other.onnx", "--run", "r", "--target", "openvino", "--anyway")
    assert told.exit_code == 0, told.output
    assert "trained for openvino, the output would be quantised" in told.stderr
    assert "low precision" in told.stdout  # proven in the other target's runtime
    as_json = run("export", "m.onnx", "--run", "r", "--json")
    assert json.loads(as_json.stdout)["conformance"]["runtime"] == "TensorRT"
    assert "not run in TensorRT" in run("list", "targets").stdout
    verified = run("verify", "m.onnx", "--run", "r")
    assert verified.exit_code == 0, verified.output
    assert "not run in TensorRT" in verified.stdout
    assert "constants: all those of the student" in verified.stdout
    assert "quantised tensors are the student's on the runtime's own codes" in verified.stdout
    assert "saturat" not in verified.stdout  # of x86 kernels, in which it does not run


def test_json_is_all_there_is_on_stdout(tmp_path: Path) -> None:
    trained = run("train", "--bits", "w2a3", "--method", "ewgs", "--json", *ANY, *QUICK)
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert result["label"] == "w2a3 ewgs"
    assert result["quantizers"]["weights"] == {"2": 2, "8": 2}
    assert 0 <= result["student_top1"] <= 100
    exported = run("export", "model.onnx", "--run", result["run"], "--json")
    assert exported.exit_code == 0, exported.output
    report = json.loads(exported.stdout)
    assert report["passed"]
    assert report["coverage"]["integer"]["Conv"] == 3
    assert Path(report["path"]) == Path("model.onnx")


def test_features_is_a_flag_for_its_weight(tmp_path: Path) -> None:
    assert run("train", "--bits", "4", "--features", *ANY, *QUICK).exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert open_run(folder).config.distillation.feature_weight == 1.0
    refused = run("train", "--features", "--loss", "ce", *QUICK)
    assert refused.exit_code == 2
    assert "feature_weight: goes with the losses 'kl' and 'kl+ce'" in refused.stderr


def test_options_win_over_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "quantization: {weights: {bits: 2, method: ste}}\ndistillation: {epochs: 0}\n"
        "teacher: {epochs: 1}\n"
    )
    result = run("train", "--config", "run.yaml", "--weight-bits", "3", "--output", "r", *ANY)
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "r" / "config.yaml", {})
    assert config.quantization.weights.bits == 3
    assert config.quantization.weights.method == "ste"
    assert config.quantization.activations.method == "lsq"
    assert config.distillation.epochs == 0


def test_bits_given_twice_count_last(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RunConfig] = []

    def stop(config: RunConfig, **options: object) -> None:
        found.append(config)
        raise SpecError("stopped")

    monkeypatch.setattr("sqakd_deploy.training.train.train", stop)
    run("train", *(word for bits in ("*=8", "3=2", "*=4") for word in ("--layer-bits", bits)))
    assert list(found[0].quantization.layer_bits.items()) == [("3", "2"), ("*", "4")]


def test_a_flat_folder_needs_no_label(tmp_path: Path) -> None:
    """Own images, own model, own weights: reports speak of agreement, not of accuracy."""
    photos(tmp_path / "photos")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    common = ("train", "--data", "photos", "--model", "net.py:make", "--epochs", "1", "--json")
    missing = run(*common, "--model-arg", "num_classes=4")
    assert missing.exit_code == 2
    assert "no teacher: photos has no labels to train one with; name a file" in missing.stderr
    save_weights(tmp_path / "net.py", tmp_path / "net.safetensors")
    trained = run(*common, "--model-arg", "num_classes=4", "--weights", "net.safetensors")
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert result["student_top1"] is None
    assert result["teacher_top1"] is None
    assert 0 <= result["agreement"] <= 100
    assert not result["teacher_trained"]
    exported = run("export", "model.onnx", "--json", "--min-agreement", "0")
    assert exported.exit_code == 0, exported.output
    assert all(stage["top1"] is None for stage in json.loads(exported.stdout)["stages"])


def save_weights(source: Path, path: Path) -> None:
    from sqakd_deploy.checkpoint import save_weights as save
    from sqakd_deploy.models import build_model

    save(build_model(f"{source}:make", num_classes=4, in_channels=3), path)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--method", "lsqq"], 2, "unknown method 'lsqq'. Did you mean 'lsq'? There are: dorefa"),
        (["--target", "toaster"], 2, "unknown target 'toaster'. There are: onnxruntime"),
        (["--bits", "9"], 2, "bits: wanted 1 to 8, got 9 in '9'"),
        (["--bits", "four"], 2, "bits: wanted a number like 4 or a pair like w4a8, got 'four'"),
        (["--weight-bits", "0"], 2, "quantization.weights.bits"),
        (["--exclude", "nothing.*"], 2, "exclude: 'nothing.*' matches no layer"),
        (["--layer-bits", "nothing.*=8"], 2, "layer_bits: 'nothing.*' matches no quantised conv"),
        (["--layer-bits", "stem=9"], 2, "layer_bits: 'stem': bits: wanted 1 to 8, got 9 in '9'"),
        (["--layer-bits", "stem"], 2, "wanted PATTERN=BITS, as 'layer4.*=8'; got 'stem'"),
        (["--config", "absent.yaml"], 2, "cannot read config absent.yaml: No such file"),
        (["--data", "nowhere"], 4, "nowhere"),
        (["--weights", "absent.safetensors"], 5, "absent.safetensors"),
        (["--model", "resnet21"], 6, "resnet20"),
        (["--loss", "mse"], 2, "'mse' is not one of 'kl', 'ce', 'kl+ce'"),
        (["--model-arg", "depth"], 2, "wanted key=value, got 'depth'"),
        (["--delta", "often"], 2, "distillation.delta"),
        (["--channels", "2"], 2, "data.channels: Input should be 1 or 3, got 2"),
        (
            ["--mean", "125,123,114"],
            2,
            "settings: data.mean.0, data.mean.1, data.mean.2: wanted 0 to 1; divide what counts "
            "from 0 to 255 by 255, got 125.0, 123.0, 114.0",
        ),
        (["--mean", "-0.1"], 2, "data.mean.0: wanted 0 to 1, got -0.1"),
        (["--std", "58,57,57"], 2, "by 255, got 58.0, 57.0, 57.0"),
        (["--std", "0"], 2, "data.std.0: Input should be greater than 0, got 0.0"),
        (["--std", "nan"], 2, "data.std.0: Input should be a finite number, got nan"),
        (["--delta", "0.01"], 2, "delta: scales gradients of the method ewgs, and is nothing to l"),
        (["--loss", "ce", "--temperature", "2"], 2, "temperature: the loss 'ce' has no KL to so"),
        (["--placement", "paper", "--residual-bits", "4"], 2, "residual_bits: placement 'paper' "),
        (["--placement", "paper", "--first-last-bits", "4"], 2, "first_last_bits: placement 'pa"),
        (["--device", "cuda"], 2, "device: wanted cuda, but torch sees no GPU"),
    ],
)
def test_a_bad_setting_is_one_clear_line(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    quick = QUICK[:2] if "--weights" in arguments else QUICK
    result = run("train", *quick, *arguments)
    assert result.exit_code == code, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.lower().startswith("error: ")
    assert message in last
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []  # refused before anything is written


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "distillation: {epochs: 1, warmup_steps: 11}",
            "got 11; train longer, or lower distillation.w",
        ),
        (
            "{distillation: {feature_weight: 1}, quantization: {exclude: ['conv*']}}",
            "features: no layer of this model has 4-bit weights and reads 4-bit activations",
        ),
    ],
)
def test_what_the_student_cannot_be_is_refused_before_a_teacher_is_trained(
    settings: str, message: str
) -> None:
    Path("settings.yaml").write_text(settings)
    refused = run("train", *ANY, "--config", "settings.yaml")
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--output", ""),
        ("train", "--data", ""),
        ("train", "--weights", ""),
        ("train", "--config", ""),
        ("eval", ""),
        ("export", ""),
        ("export", "m.onnx", "--data", ""),
        ("verify", "m.onnx", "--save-reference", ""),
        ("bench", ""),
    ],
)
def test_an_empty_text_is_no_path(arguments: tuple[str, ...], tmp_path: Path) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2, refused.output
    assert "wanted a name or a path, got an empty text: is a variable" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "teacher", "eval"])
@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("resnet21", 6, "unknown model 'resnet21'"),
        ("torchvision:nothing", 6, "unknown model 'torchvision:nothing'"),
        ("absent.py:make", 6, "absent.py does not exist"),
        ("resnet20", 5, "weight file absent.pth does not exist"),
    ],
)
def test_what_is_not_there_is_refused_before_images_are_read(
    command: str, model: str, code: int, message: str
) -> None:
    weights = ("absent.pth",) if command == "eval" else ("--weights", "absent.pth")
    result = run(command, *weights, "--model", model, "--data", "nowhere")
    assert result.exit_code == code, result.output
    assert message in result.stderr


def test_a_corrupt_image_is_named_or_skipped_and_counted(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", classes=("cat", "dog"))
    broken = folder / "cat" / "broken.png"
    broken.write_bytes((folder / "cat" / "000.png").read_bytes()[:40])
    common = ("train", "--data", "photos", *ANY, *QUICK)
    stopped = run(*common)
    assert stopped.exit_code == 4
    assert "broken.png" in stopped.stderr
    assert not (tmp_path / "runs").exists()
    skipped = run(*common, "--skip-bad-images")
    assert skipped.exit_code == 0, skipped.output
    assert "skipped 1 unreadable images" in skipped.stderr
    assert "broken.png" in skipped.stderr


def test_what_is_said_about_data_is_kept_and_used(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", classes=("a", "b"))
    cache = tmp_path / "kept"
    options = ("--mean", "0.25,0.5,0.75", "--std", "0.5", "--augmentation", "none")
    options += ("--cache", str(cache), "--workers", "0")
    trained = run("train", "--data", str(folder), *options, *ANY, *QUICK)
    assert trained.exit_code == 0, trained.output
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".u8"]
    (home,) = (tmp_path / "runs").iterdir()
    facts = open_run(home)
    assert facts.facts["data"]["preprocessing"]["mean"] == [0.25, 0.5, 0.75]
    assert facts.facts["data"]["preprocessing"]["std"] == [0.5] * 3
    assert facts.config.data.cache == str(cache)

    exported = run("export", "model.onnx", "--min-agreement", "0", "--max-accuracy-gap", "100")
    assert exported.exit_code == 0, exported.output


def test_a_reader_that_has_left_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the interpreter ends, and then says so itself, only a flush meets a closed pipe."""

    class Left(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Left())
    with pytest.raises(SystemExit) as ended:
        main.main(["list", "methods", "--json"])
    assert ended.value.code == 1


def test_a_reference_is_there_before_anything_is_printed(
    untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(untrained, "r")

    def left(report: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sqakd_deploy.commands.parity_parts", left)
    options = ("--run", "r", "--min-agreement", "0", "--save-reference", "r.npz")
    assert run("export", "m.onnx", *options).exit_code == 1
    assert Path("m.onnx").exists()
    assert Path("r.npz").exists()


def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    trained = run("train", *UNTRAINED, "--output", "runs/p[/q]")
    assert trained.exit_code == 0, trained.output
    assert "w4a4 lsq: runs/p[/q]" in trained.stdout
    exported = run("export", "m [a].onnx", "--min-agreement", "0", "--run", "runs/p[/q]")
    assert exported.exit_code == 0, exported.output
    assert "exporting runs/p[/q] (complete)" in exported.stderr
    assert "wrote m [a].onnx" in exported.stdout
    verified = run("verify", "m [a].onnx", "--run", "runs/p[/q]", "--save-reference", "r [a].npz")
    assert "verifying against runs/p[/q] (complete)" in verified.stderr
    assert "wrote r [a].npz" in verified.stderr


def test_a_run_of_a_relative_folder_is_used_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos", classes=("a", "b"))
    trained = run("train", "--data", "photos", "--cache", "kept", *UNTRAINED, "--output", "r")
    assert trained.exit_code == 0, trained.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exported = run("export", "m.onnx", "--run", str(tmp_path / "r"), "--min-agreement", "0")
    assert exported.exit_code == 0, exported.output
    assert (
        "\n2 images alone: what differs in one of a hundred may not be among them"
        in exported.stdout
    )
    named = run("verify", "m.onnx", "--run", str(tmp_path / "r"), "--data", "../photos")
    assert "Parity on 2 images" in named.stdout  # it trained on the others
    assert run("eval", str(tmp_path / "r")).exit_code == 0
    assert [path.name for path in Path().iterdir()] == ["m.onnx"]


def test_images_that_are_gone_are_named_by_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not taken for the name of a data set."""
    photos(tmp_path / "photos", classes=("a", "b"))
    assert run("train", "--data", "photos", *UNTRAINED).exit_code == 0
    (own,) = map(str, Path("runs").iterdir())
    Path("photos").rename("moved")
    gone = f"error: the images of run {own} are gone: there is no folder {tmp_path}/photos; "
    for command in (("export", "m.onnx"), ("eval", own)):
        done = run(*command)
        assert done.exit_code == 4, done.output
        assert gone + "name where it is now with --data" in done.stderr
        assert run(*command, "--data", "moved").exit_code in (0, 3)
    facts = json.loads(Path(own, "run.json").read_text())
    Path(own, "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    assert gone + "put it back to go on" in run("train", "--resume", own).stderr


def test_without_a_cache_and_with_workers_the_student_is_the_same(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", classes=("a", "b"))
    common = ("train", "--data", str(folder), *ANY, "--epochs", "1", "--teacher-epochs", "1")
    ways = {"a": (), "b": ("--no-cache",), "c": ("--max-cache-gb", "0", "--workers", "0")}
    for name, way in ways.items():
        trained = run(*common, *way, "--output", name)
        assert trained.exit_code == 0, trained.output
    assert "are more than max_cache_gb = 0" in " ".join(trained.stderr.split())
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ways]
    assert students[0] == students[1] == students[2]


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("train", "--data", "empty", *QUICK)
    assert result.exit_code == 4
    assert "empty" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("gone/m.onnx",), 7, "the folder gone does not exist"),
        (("m.onnx", "--save-reference", "gone/r.npz"), 7, "the folder gone does not exist"),
        (("m.onnx", "--target", "toaster"), 2, "'toaster'"),
    ],
)
def test_a_wrong_export_is_refused_before_a_run_is_read(
    arguments: tuple[str, ...], code: int, message: str
) -> None:
    """There is no run here, which would be the error of any that is looked for."""
    result = run("export", *arguments)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


def test_nothing_to_export(tmp_path: Path) -> None:
    result = run("export", "model.onnx")
    assert result.exit_code == 5
    assert "no run to export under" in result.stderr
    assert not (tmp_path / "model.onnx").exists()


def test_a_damaged_run_is_refused(untrained: Path, tmp_path: Path) -> None:
    copytree(untrained, "r")
    student = tmp_path / "r" / "student.safetensors"
    whole = student.read_bytes()
    student.write_bytes(whole[: len(whole) // 2])
    result = run("export", "model.onnx", "--run", "r")
    assert result.exit_code == 5
    assert "student.safetensors is truncated" in result.stderr
    student.write_bytes(whole)
    config = tmp_path / "r" / "config.yaml"
    config.write_text(config.read_text().replace(SMALL, "vgg8"))
    result = run("export", "model.onnx", "--run", "r")
    assert result.exit_code == 5
    assert "belongs to another model" in result.stderr
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_student_placed_by_other_rules_is_refused(resumed: bool, tmp_path: Path) -> None:
    """Of before rules were kept, or of another version: it would be read as another student."""
    pytest.importorskip("openvino")
    done = run("train", "--target", "openvino", *UNTRAINED, "--output", "r")
    assert done.exit_code == 0, done.output
    facts = json.loads(Path("r/run.json").read_text())
    assert facts["placement"]["widest_ends"] == 7
    command = ("train", "--resume", "r") if resumed else ("export", "m.onnx", "--run", "r")
    status = {"status": "running"} if resumed else {}
    for placement in ({}, {"placement": {**facts["placement"], "widest_ends": 8}}):
        old = {k: v for k, v in facts.items() if k != "placement"} | placement | status
        Path("r/run.json").write_text(json.dumps(old))
        refused = run(*command)
        assert refused.exit_code == 5
        assert "placed by other rules of target 'openvino' (widest_ends 8, now 7)" in refused.stderr
    damaged = {**facts, "placement": 5, **status}
    Path("r/run.json").write_text(json.dumps(damaged))
    assert "placement in run.json holds no rules" in run(*command).stderr
    assert not Path("m.onnx").exists()


def test_a_failed_proof_leaves_no_file(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(untrained, "r")
    monkeypatch.setattr("sqakd_deploy.commands.Tolerance", lambda *asked: Tolerance(100.5))
    result = run("export", "model.onnx", "--run", "r")
    assert result.exit_code == 3
    assert "error: the exported file is not its student" in result.stderr
    assert "Parity on 360 images" in result.stdout
    assert not [path for path in tmp_path.iterdir() if path.name != "r"]


def test_a_run_is_never_overwritten(untrained: Path) -> None:
    copytree(untrained, "r")
    again = run("train", *UNTRAINED, "--output", "r")
    assert again.exit_code == 5
    assert "r already holds a run" in again.stderr


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("train", *QUICK, "--output", "file/run")
    assert result.exit_code == 5
    assert "cannot write the run folder" in result.stderr


# -- processes -----------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sqakd_deploy", *arguments]


def test_help_needs_no_torch() -> None:
    code = "import sys; from sqakd_deploy.cli import main\n"
    code += "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sqakd-deploy train --bits 4" in done.stdout
    assert "Examples:" in run("--help").output
    assert "Exit codes:" in run("export", "--help").output


def test_version_and_lists() -> None:
    assert run("--version").output.strip() == f"sqakd-deploy, version {__version__}"
    everything = json.loads(run("list", "--json").stdout)
    assert set(everything) == {"methods", "models", "datasets", "targets"}
    assert set(everything["methods"]) >= {"ste", "pact", "lsq", "dorefa", "ewgs"}
    assert everything["models"]["resnet20"] == "built in, for 32×32 images"
    assert everything["models"]["vgg11_tiny"].startswith("built in, for Tiny-ImageNet at 224×224;")
    assert everything["models"]["resnet18"] == "torchvision"
    assert "digits" in everything["datasets"]
    assert "onnxruntime" in run("list", "targets").stdout
    last = run("list", "models").stdout.splitlines()[-1]
    assert last.startswith("other models: timm:NAME, where timm is installed; file.py:function")


def test_runs_with_settings_that_are_refused_today_are_read(untrained: Path) -> None:
    """They did nothing, and do nothing."""
    copytree(untrained, "r")
    config = yaml.safe_load(Path("r/config.yaml").read_text())
    config["distillation"] |= {"loss": "ce", "temperature": 2.0, "delta": 0.5}
    Path("r/config.yaml").write_text(yaml.safe_dump(config))
    assert run("eval", "r").exit_code == 0


def test_settings_for_a_run_that_is_complete_take_a_new_run(untrained: Path) -> None:
    copytree(untrained, "a run")
    assert "takes a new run" not in run("train", "--resume", "nothing", "--epochs", "1").stderr
    refused = run("train", "--resume", "a run", "--epochs", "1")
    (anew,) = re.findall(r"takes a new run: `sqakd-deploy (.*)` and the other", refused.stderr)
    assert refused.exit_code == 2
    trained = run(*shlex.split(anew), "--epochs", "1", "--output", "again")
    assert trained.exit_code == 0, trained.output
    assert open_run("again").config.distillation.epochs == 1


def test_an_interrupt_leaves_a_run_that_can_be_looked_at(tmp_path: Path) -> None:
    epochs = ("--teacher-epochs", "2", "--epochs", "40000")
    arguments = command("train", *ANY, *epochs, "--compile", "off", "--output", "r")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs inherit an ignored one
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    metrics = tmp_path / "r" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and '"student"' in metrics.read_text():
                break
            time.sleep(0.1)
        assert '"student"' in metrics.read_text()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted; what there is stays in r" in errors
    assert "Traceback" not in errors
    run_folder = open_run(tmp_path / "r")
    assert run_folder.status == "interrupted"
    first = json.loads(metrics.read_text().splitlines()[0])
    assert (first["part"], first["epoch"]) == ("teacher", 0)
    exported = run("export", "model.onnx", "--run", "r", "--json")
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout)["run"] == "r"


def test_an_export_for_pixels_says_how_they_are_normalised(tmp_path: Path) -> None:
    photos(tmp_path / "photos", classes=("a", "b"))
    trained = run("train", "--data", "photos", *UNTRAINED, "--output", "r")
    assert trained.exit_code == 0, trained.output
    options = ("--run", "r", "--min-agreement", "0", "--input", "uint8", "--input-layout", "nhwc")
    exported = run("export", "m.onnx", *options, "--batch", "2", "--input-name", "pixels")
    assert exported.exit_code == 0, exported.output
    assert "input uint8: normalisation stays as float nodes before the first" in exported.stdout
    (given,) = onnx.load("m.onnx").graph.input
    assert given.name == "pixels"
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [2, 8, 8, 3]
    exported = run("export", "m.onnx", *options[:4], "--json")
    assert json.loads(exported.stdout)["input"].startswith("float32: the caller prepares")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--batch", "0"), "wanted a number of images from 1 on, or dynamic; got '0'"),
        (("--batch", "many"), "wanted a number of images from 1 on, or dynamic; got 'many'"),
        (("--input", "int8"), "'int8' is not one of 'float32', 'uint8'"),
    ],
)
def test_bad_export_options_are_usage_errors(options: tuple[str, ...], text: str) -> None:
    result = run("export", "model.onnx", *options)
    assert result.exit_code == 2
    assert text in result.stderr


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    """In another process, and on another number of threads."""
    options = ("train", *ANY, *QUICK, "--output")
    assert run(*options, "a").exit_code == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run(command(*options, "b"), env=environment, check=True, capture_output=True)
    for file in ("teacher.safetensors", "student.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--min-agreement", "100.5", "not in the range 0<=x<=100"),
        ("--min-agreement", "-1", "not in the range 0<=x<=100"),
        ("--min-agreement", "nan", "wanted a finite number, got nan"),
        ("--max-accuracy-gap", "-0.1", "not in the range 0<=x<=100"),
        ("--max-mean-error", "-4", "not in the range x>=0"),
        ("--max-mean-error", "inf", "wanted a finite number, got inf"),
    ],
)
def test_tolerances_are_checked_at_once(option: str, value: str, said: str) -> None:
    for command in ("export", "verify"):
        result = run(command, "m.onnx", "--run", "none", option, value)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_what_no_file_of_the_target_has_is_refused_before_the_student_is_read(
    untrained: Path,
) -> None:
    copytree(untrained, "r")
    Path("r", "student.safetensors").write_bytes(b"damaged")
    for arguments, said in (
        (("m5",), "m5: wanted a name that ends in .onnx, by which other commands know the file; "
                  "for instance m5.onnx"),
        (("m.pt",), "for instance m.pt.onnx"),
        (("w4.onx",), "for instance w4.onnx"),
        (("m.xml",), "for instance m.xml.onnx; .xml is OpenVINO IR, which --target openvino write"),
        (("m.onnx", "--opset", "5"), "opset: wanted 13 to 25 for target 'onnxruntime', got 5"),
        (("m.onnx", "--opset", "99"), "got 99"),
        (("m.onnx", "--input-name", "a", "--output-name", "a"), "wanted two names, got 'a' for bo"),
    ):  # fmt: skip
        result = run("export", *arguments, "--run", "r")
        assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert run("export", "m.xml", "--run", "r", "--target", "openvino").exit_code == 5


def test_sizes_that_no_memory_holds_are_refused() -> None:
    result = run("train", "--epochs", "0", "--input-size", "1000000", "1000000")
    assert result.exit_code == 2, result.output
    assert "input_size.0, input_size.1: Input should be less than or equal to 4096" in result.stderr


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_cache_and_none_contradict_each_other(order: tuple[int, int]) -> None:
    options = (("--cache", "kept"), ("--no-cache",))
    result = run("train", *options[order[0]], *options[order[1]])
    assert result.exit_code == 2
    assert "--cache and --no-cache contradict each other; give one" in result.stderr


PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("environment", "arguments", "escaped"),
    [
        ({"PYTHONIOENCODING": "ascii"}, ("list", "datasets"), "8\\xd78 (embedded)"),
        ({"PYTHONIOENCODING": "latin-1"}, ("train", "--help"), "cores \\u2212 1"),
        (PLAIN, ("list", "datasets"), "8\\xd78 (embedded)"),
        (PLAIN, ("list", "datasets", "--json"), "8\\u00d78 (embedded)"),
    ],
)
def test_text_that_stdout_cannot_encode_is_escaped(
    environment: dict[str, str], arguments: tuple[str, ...], escaped: str
) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIO", "PYTHONUT"))}
    done = subprocess.run(
        [sys.executable, "-m", "sqakd_deploy", *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        encoding="latin-1",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert escaped in " ".join(done.stdout.split())


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("errors", "written"), [("strict", b"ou\\udcfft"), ("surrogateescape", b"ou\xfft")]
)
def test_names_that_are_no_utf_8_can_be_printed(
    stream: str, errors: str, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, stream, out)
    take_any_text()
    console(stderr=stream == "stderr").print("ou\udcfft")
    out.flush()
    assert out.buffer.getvalue() == written + b"\n"  # type: ignore[attr-defined]

"""``sqakd-deploy verify``: against a run, against saved answers, and without torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from small_network import SMALL

from sqakd_deploy.cli import main
from sqakd_deploy.errors import DataError
from sqakd_deploy.verification.reference import load_reference, save_reference

FEW = {"images": np.zeros((2, 3)), "logits": np.zeros((2, 3))}
CODES = {"tensor|q": np.zeros((1, 4), np.uint8), "grid|q": np.array([0.5, 3.0])}

ONE = ("--runtime", "onnxruntime")  # whatever else is installed


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its file, answers saved by export and answers saved with tensors by verify."""
    folder = tmp_path_factory.mktemp("home")
    options = ("--model", SMALL, "--epochs", 0, "--teacher-epochs", 1)
    trained = run("train", *options, "--output", folder / "r")
    assert trained.exit_code == 0, trained.output
    exported = run("export", folder / "m.onnx", "--run", folder / "r", "--no-pack",
                   "--save-reference", folder / "plain.npz", "--samples", 40)  # fmt: skip
    assert exported.exit_code == 0, exported.output
    options = ("--samples", 60, "--layers", "--layer-samples", 12, "--json", *ONE)
    verified = run("verify", folder / "m.onnx", "--run", folder / "r", *options,
                   "--save-reference", folder / "full.npz")  # fmt: skip
    assert verified.exit_code == 0, verified.output
    (folder / "verified.json").write_text(verified.stdout)
    return folder


def faulty(home: Path, folder: Path, name: str, change: object) -> Path:
    proto = onnx.load(home / "m.onnx")
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    array = change(numpy_helper.to_array(tensor))  # type: ignore[operator]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
    onnx.save(proto, folder / "faulty.onnx")
    return folder / "faulty.onnx"


def test_a_run_is_compared_in_all_stages(home: Path) -> None:
    report = json.loads((home / "verified.json").read_text())
    assert report["passed"]
    assert report["parity"]["samples"] == 60
    names = [stage["name"] for stage in report["parity"]["stages"]]
    assert names[:3] == [
        "PyTorch student",
        "onnxruntime, optimisations off",
        "onnxruntime, optimisations on",
    ]
    assert report["constants"] == []
    assert len(report["layers"]["tensors"]) == 8
    assert report["layers"]["images"] == 12
    assert {layer["layer"] for layer in report["saturation"]["layers"]} >= {"stem", "classifier"}


def test_saved_answers_say_the_same(home: Path) -> None:
    """The reference has everything the run had but the student itself, to run on other codes."""
    again = run("verify", home / "m.onnx", "--reference", home / "full.npz", "--layers",
                "--layer-samples", 12, "--json", *ONE)  # fmt: skip
    assert again.exit_code == 0, again.output
    first, second = json.loads((home / "verified.json").read_text()), json.loads(again.stdout)
    assert second["parity"]["stages"][0]["name"] == "saved reference"
    for report in (first, second):
        del report["parity"]["stages"][0]["name"], report["path"]
    isolated = first["layers"].pop("isolated")
    assert [len(stage["tensors"]) for stage in isolated.values()] == [8, 8, 8]
    assert second["layers"].pop("isolated") == {}
    assert second == first


def test_without_torch(home: Path) -> None:
    code = (
        "import sys\nfrom sqakd_deploy.cli import main\n"
        f"try: main(['verify', {str(home / 'm.onnx')!r}, '--layers', *{ONE!r},"
        f" '--reference', {str(home / 'full.npz')!r}])\n"
        "except SystemExit as done: code = done.code\n"
        "print(code, sorted({'torch', 'brevitas', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "Parity on 60 images" in done.stdout


def test_the_files_own_run_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was trained since."""
    (home / "runs").mkdir()
    monkeypatch.chdir(home)
    shutil.copytree("r", "runs/own")
    quick = ("--model", SMALL, "--epochs", 0, "--teacher-epochs", 1, "--seed", 1)
    assert run("train", *quick, "--output", "runs/newer").exit_code == 0
    done = run("verify", "m.onnx", "--samples", 20, *ONE)
    assert done.exit_code == 0, done.output
    assert "verifying against runs/own" in done.stderr
    assert "another student" not in done.stderr
    other = run("verify", "m.onnx", "--samples", 20, "--run", "runs/newer", *ONE)
    assert other.exit_code == 3
    said = other.stderr.splitlines()
    assert said[1] == "m.onnx is of another student than runs/newer's: of runs/own's"
    assert "wrong constant" in other.stdout
    shutil.rmtree("runs/own")
    other = run("verify", "m.onnx", "--samples", 20, "--run", "runs/newer", *ONE)
    said = other.stderr.splitlines()
    assert said[1] == "m.onnx is of another student than runs/newer's: its checksum says so"
    done = run("verify", "m.onnx", "--samples", 20, *ONE)
    assert done.exit_code == 5
    assert "error: m.onnx is the student of no run under" in done.stderr


def test_a_fault_is_named_and_fails(home: Path, tmp_path: Path) -> None:
    path = faulty(home, tmp_path, "conv1/bias", lambda codes: codes + np.int32(20000))
    for source in (("--run", home / "r"), ("--reference", home / "full.npz")):
        result = run("verify", path, *source, "--layers")
        assert result.exit_code == 3
        assert "wrong constant: conv1: bias codes: 8 of 8 differ" in result.stdout
        assert "export: differences begin in 1 tensor, the first quant_relu_1" in result.stdout
        assert "error: the file is not its student: conv1: bias codes" in result.stderr


def test_answers_alone_tell_that_not_where(home: Path, tmp_path: Path) -> None:
    """Any .npz of images and logits will do, whoever wrote it."""
    with np.load(home / "plain.npz") as stored:
        np.savez(tmp_path / "bare.npz", images=stored["images"], logits=stored["logits"])
    good = run("verify", home / "m.onnx", "--reference", tmp_path / "bare.npz", *ONE)
    assert good.exit_code == 0, good.output
    assert "constants: not compared, since only answers are known" in good.stdout
    assert "1/255 of the logits' range" in good.stdout
    path = faulty(home, tmp_path, "classifier/weight", lambda codes: codes[::-1])
    bad = run("verify", path, "--reference", tmp_path / "bare.npz")
    assert bad.exit_code == 3
    assert "optimisations off: agreement" in bad.stderr
    layers = run("verify", path, "--reference", tmp_path / "bare.npz", "--layers")
    assert layers.exit_code == 4
    assert "the reference has no tensors to compare layers with" in layers.stderr


def test_other_runtimes_can_be_chosen(home: Path) -> None:
    options = ("--reference", home / "plain.npz", "--json", "--runtime")
    alone = run("verify", home / "m.onnx", *options, "onnxruntime")
    assert alone.exit_code == 0, alone.output
    assert len(json.loads(alone.stdout)["parity"]["stages"]) == 3
    unknown = run("verify", home / "m.onnx", *options, "toaster")
    assert unknown.exit_code == 2
    assert "unknown runtime 'toaster'. There are: " in unknown.stderr


def test_the_tolerance_is_the_callers(home: Path, tmp_path: Path) -> None:
    """Three answers of 40 are others than the file's."""
    with np.load(home / "plain.npz") as stored:
        images, logits = stored["images"], stored["logits"]
    logits[:3] = -logits[:3]
    np.savez(tmp_path / "other.npz", images=images, logits=logits)
    loose = ("--reference", tmp_path / "other.npz", "--max-mean-error", 1000)
    refused = run("verify", home / "m.onnx", *loose, "--min-agreement", 95)
    assert refused.exit_code == 3
    assert "agreement 92.50 % is below 95.00 %" in refused.stderr
    assert run("verify", home / "m.onnx", *loose, "--min-agreement", 90).exit_code == 0


@pytest.mark.parametrize(
    ("option", "named"),
    [(("--run", "r"), "--run"), (("--samples", "3"), "--samples"), (("--data", "digits"), "--data"),
     (("--save-reference", "x.npz"), "--save-reference")],
)  # fmt: skip
def test_a_reference_stands_alone(home: Path, option: tuple[str, str], named: str) -> None:
    result = run("verify", home / "m.onnx", "--reference", home / "plain.npz", *option)
    assert result.exit_code == 2
    assert f"has images and answers of its own; leave out {named}" in result.stderr


def test_bad_input_is_one_clear_line(home: Path, tmp_path: Path) -> None:
    missing = run("verify", home / "m.onnx", "--reference", tmp_path / "absent.npz")
    assert missing.exit_code == 4
    assert "cannot read the reference" in missing.stderr
    gone = run("verify", tmp_path / "absent.onnx", "--reference", home / "plain.npz")
    assert gone.exit_code == 7
    assert "there is no file" in gone.stderr
    assert "Traceback" not in missing.output + gone.output


def test_help_has_examples() -> None:
    text = run("verify", "--help").output
    assert "Examples:" in text
    assert "Exit codes:" in text
    assert "sqakd-deploy verify model.onnx --reference answers.npz --layers --json" in text


# -- the file of answers --------------------------------------------------------------------------


def test_a_reference_comes_back_whole(home: Path, tmp_path: Path) -> None:
    saved = load_reference(home / "full.npz")
    save_reference(saved, tmp_path / "again.npz")
    again = load_reference(tmp_path / "again.npz")
    assert (again.step, again.sizes) == (saved.step, saved.sizes)
    np.testing.assert_array_equal(again.logits, saved.logits)
    np.testing.assert_array_equal(np.concatenate(again.batches), np.concatenate(saved.batches))
    assert saved.constants is not None
    assert again.constants is not None
    assert again.metadata == saved.metadata
    keys = ("preprocessing", "classes", "spec", "student")
    assert {f"sqakd.{key}" for key in keys} == set(again.metadata or ())
    assert list(again.constants) == list(saved.constants)
    assert saved.tensors is not None
    assert again.tensors is not None
    for name, tensor in saved.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].codes, tensor.codes)
        assert again.tensors[name].scale == tensor.scale
    assert [path.name for path in tmp_path.iterdir()] == ["again.npz"]


def test_images_are_picked_across_batches(home: Path) -> None:
    reference = load_reference(home / "plain.npz")
    whole = np.concatenate(reference.batches)
    cut = type(reference)("cut", (whole[:7], whole[7:8], whole[8:]), reference.logits)
    indices = np.array([39, 0, 6, 7, 8])
    np.testing.assert_array_equal(cut.images(indices), whole[indices])


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"images": np.zeros((2, 3))}, r"wanted arrays images and logits, got images"),
        ({"logits": np.zeros((2, 3))}, r"wanted arrays images and logits, got logits"),
        (
            {"images": np.zeros((2, 3)), "logits": np.zeros((3, 3))},
            r"wanted as many logits .* got images \(2, 3\), logits \(3, 3\)",
        ),
        ({"images": np.zeros((0, 3)), "logits": np.zeros((0, 3))}, "at least one"),
        ({"images": np.array([{}]), "logits": np.zeros((1, 3))}, "is no reference, or damaged"),
        ({"images": np.zeros((2, 3)), "logits": np.zeros(2)}, r"logits \(N, K\), got .*\(2,\)"),
        ({"images": np.zeros((2, 3)), "logits": np.zeros((2, 0))}, r"logits \(N, K\), got"),
        (FEW | {"labels": np.array(["a", "b"])}, r"wanted labels \(N,\) in whole numbers, got <U1"),
        (FEW | {"labels": np.zeros((2, 1), int)}, r"in whole numbers, got int64 \(2, 1\)"),
        (FEW | {"labels": np.array([0.0, np.nan])}, "in whole numbers, got float64"),
        (FEW | {"labels": np.array([0.0, 0.5])}, "in whole numbers, got float64"),
        (FEW | {"images": np.full((2, 1, 2, 2), np.inf)}, "images hold values that are not fin"),
        (FEW | {"logits": np.array([[0.0], [np.nan]])}, "logits hold values that are not fin"),
        (FEW | {"step": np.zeros(3), "step_source": np.array("x")}, "is no reference, or damaged"),
        (FEW | {"step": np.array(0.0), "step_source": np.array("x")}, "wanted a step above 0"),
        (FEW | {"step": np.array(1.0)}, "step_source"),
        (FEW | {"sizes": np.arange(9)}, "is no reference, or damaged"),
        (FEW | {"metadata|sqakd.classes": np.array("[")}, "is no reference, or damaged"),
        (FEW | {"tensor|q": np.zeros((1, 4), np.uint8)}, r"grid\|q"),
        (FEW | CODES, "wanted tensor_images, the indices"),
        (FEW | CODES | {"tensor_images": np.array([2])}, "wanted tensor_images below 2"),
        (FEW | CODES | {"tensor_images": np.array([0, 1])}, "q: wanted codes of 2 images"),
    ],
)
def test_what_a_reference_lacks_is_named(
    arrays: dict[str, np.ndarray], text: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "r.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=text):
        load_reference(tmp_path / "r.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 truncated"])
def test_a_damaged_reference_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.npz is no reference, or damaged|cannot read"):
        load_reference(tmp_path / "r.npz")


def test_a_reference_that_cannot_be_written(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write the reference .*No such file"):
        save_reference(load_reference(home / "plain.npz"), tmp_path / "nowhere" / "r.npz")


def test_many_faults_are_counted_not_listed(home: Path, tmp_path: Path) -> None:
    """As where the wrong run was named: whoever reads them wants the first."""
    proto = onnx.load(home / "m.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(("/scale", "/bias")):
            array = numpy_helper.to_array(tensor)
            made = (
                array + array.dtype.type(1)
                if array.dtype == np.int32
                else array * array.dtype.type(1.5)
            )
            tensor.CopyFrom(numpy_helper.from_array(made, tensor.name))
    onnx.save(proto, tmp_path / "m.onnx")
    result = run("verify", tmp_path / "m.onnx", "--run", home / "r", *ONE)
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("wrong constant: ")]) == 10
    more = next(line for line in lines if line.startswith("and "))
    assert re.fullmatch(r"and \d+ more: see --json", more)
    assert len(json.loads(run("verify", tmp_path / "m.onnx", "--run", home / "r", "--json",
                              *ONE).stdout)["constants"]) == 10 + int(more.split()[1])  # fmt: skip

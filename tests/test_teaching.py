"""Teachers as runs of their own, and scores of what they and their students answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, copytree

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from small_network import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sqakd_deploy
from sqakd_deploy.checkpoint import Run, open_run, save_weights
from sqakd_deploy.cli import main
from sqakd_deploy.config import DataConfig, RunConfig
from sqakd_deploy.errors import CheckpointError, DataError, SpecError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.listening import Listener
from sqakd_deploy.models import build_model
from sqakd_deploy.models.weights import read_state_dict
from sqakd_deploy.runs import held_out, load_student, load_teacher
from sqakd_deploy.scoring import score_file, score_logits, score_run
from sqakd_deploy.training.job import reopen
from sqakd_deploy.training.teaching import teach

ANY = ("--model", SMALL)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's run on the digits and, beside it, a calibrated student's with its file."""
    home = tmp_path_factory.mktemp("trained")
    teacher, student = str(home / "teacher"), str(home / "student")
    weights = str(home / "teacher" / "teacher.safetensors")
    for command in (
        ("teacher", *ANY, "--epochs", "3", "--output", teacher, "--tensorboard"),
        ("train", "--epochs", "0", "--bits", "8", "--weights", weights, "--output", student),
        ("export", str(home / "model.onnx"), "--run", student),
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    return home


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def scores(*arguments: str) -> list[dict[str, object]]:
    done = run("eval", *arguments, "--json")
    assert done.exit_code == 0, done.output
    values: list[dict[str, object]] = json.loads(done.stdout)
    return values


# -- the arithmetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path, sqakd_deploy.open_run])
def test_a_run_is_its_folder_named_or_opened(
    form: Callable[[str], str | Path | Run], trained: Path
) -> None:
    student = form(str(trained / "student"))
    loaded = sqakd_deploy.load_student(student)
    assert loaded.run.path == trained / "student"
    scored = sqakd_deploy.score_run(student, limit=20)
    assert [score.what for score in scored] == ["student", "teacher"]
    theirs, preprocessing = load_teacher(student)
    assert preprocessing == loaded.preprocessing
    assert not theirs.training


@pytest.mark.parametrize("form", [str, Path])
def test_a_run_to_go_on_with_is_named_in_either_form(
    form: type[str] | type[Path], trained: Path
) -> None:
    with pytest.raises(SpecError, match=r"student is complete; export it"):
        sqakd_deploy.train(resume=form(trained / "student"))
    with pytest.raises(SpecError, match=r"teacher is complete; give its weights to a student"):
        sqakd_deploy.teach(resume=form(trained / "teacher"))


def test_scores_against_a_count_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 8)).astype(np.float32)
    labels = rng.integers(0, 8, 50)
    score = score_logits("model", logits, labels)
    rows = zip(logits, labels, strict=True)
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in rows]
    assert score.top1 == pytest.approx(100 * np.mean([rank == 0 for rank in ranks]))
    assert score.top5 == pytest.approx(100 * np.mean([rank < 5 for rank in ranks]))
    wide = logits.astype(np.float64)
    losses = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(50), labels]
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)


def test_five_classes_have_no_top_5() -> None:
    score = score_logits("model", np.eye(5, dtype=np.float32), np.arange(5))
    assert (score.top1, score.top5) == (100.0, None)


def test_a_label_without_a_logit_is_refused() -> None:
    with pytest.raises(DataError, match="labels up to 9, the model knows 3 classes"):
        score_logits("model", np.zeros((2, 3), np.float32), np.array([0, 9]))


# -- the commands --------------------------------------------------------------------------------


def test_a_teacher_learns_and_its_run_says_so(trained: Path) -> None:
    folder = open_run(trained / "teacher")
    assert (folder.kind, folder.status) == ("teacher", "complete")
    assert not (folder.path / "last").exists()
    score = folder.facts["results"]["score"]
    assert score["top1"] > 50  # of ten classes, after three epochs
    assert scores(str(folder.path)) == [score]


def test_what_eval_says_of_a_run_a_file_and_weights(trained: Path) -> None:
    student, teacher = scores(str(trained / "student"))
    assert (student["what"], teacher["what"]) == ("student", "teacher")
    loaded = load_student(open_run(trained / "student"))
    images, split = held_out(loaded)
    hits = predict(loaded.student, images).argmax(axis=1) == split.need_labels()
    assert student["top1"] == pytest.approx(100 * hits.mean())
    (file,) = scores(str(trained / "model.onnx"))
    assert file["top1"] == student["top1"]  # proven at export
    (weights,) = scores(str(trained / "teacher" / "teacher.safetensors"))
    assert weights == {**teacher, "what": "float model"}
    (some,) = scores(str(trained / "model.onnx"), "--samples", "20")
    assert some["images"] == 20


def test_the_images_of_a_proof_are_of_all_classes(trained: Path) -> None:
    for value, name in enumerate("0123456789"):
        for index in range(2):
            home = Path("tens") / name
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(home / f"{index}.png")
    images, split = held_out(load_student(open_run(trained / "student")), "tens", 5)
    assert split.need_labels().tolist() == [0, 4, 8, 2, 6]
    assert split.images[np.arange(5)].max(axis=(1, 2, 3)).tolist() == [0, 4, 8, 2, 6]
    assert [len(batch) for batch in images] == [5]


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_a_proof_takes_all_of_a_named_folder_but_its_training_part(
    parts: tuple[str, ...], trained: Path
) -> None:
    for part in parts:
        grey(Path("named") / part / "a")
        grey(Path("named") / part / "b")
    images, split = held_out(load_student(open_run(trained / "student")), "named")
    assert len(split) == sum(len(batch) for batch in images) == 16


def test_grey_images_for_a_model_of_rgb() -> None:
    """From a teacher's run to the score of the file; nobody says twice how many channels."""
    for name in ("a", "b"):
        grey(Path("grey") / name)
    common = ("--data", "grey", "--epochs", "0", "--weights", "t/teacher.safetensors")
    loose = ("--min-agreement", "0", "--max-accuracy-gap", "100", "--max-mean-error", "100")
    for command in (
        ("teacher", *ANY, "--data", "grey", "--channels", "3", "--epochs", "1", "--output", "t"),
        ("train", *common, "--bits", "8", "--output", "s"),
        ("export", "m.onnx", "--run", "s", *loose),
    ):
        done = run(*command)
        assert done.exit_code == 0, done.output
    for folder in ("t", "s"):
        assert open_run(Path(folder)).facts["data"]["preprocessing"]["channels"] == 3
    model = onnx.load("m.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["sqakd.preprocessing"])["channels"] == 3
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 3
    (score, _), (file,) = scores("s"), scores("m.onnx", "--data", "grey", "--channels", "3")
    assert file["top1"] == score["top1"]
    copytree("s", "runs/s")  # among which the file's own run is found, and its images
    assert scores("m.onnx") == [file]
    for what, text in (("s", "leave out --channels"), ("m.onnx", "takes images of 3, got 1;")):
        refused = run("eval", what, "--data", "grey", "--channels", "1")
        assert (refused.exit_code, text in refused.stderr) == (2, True)


def test_eval_prints_a_table(trained: Path) -> None:
    shown = run("eval", str(trained / "student")).stdout
    assert "labelled images" in shown
    assert "teacher" in shown
    assert "nats" in shown


def test_curves_for_tensorboard(trained: Path) -> None:
    events = EventAccumulator(str(trained / "teacher" / "tensorboard" / "teacher"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "top-1",
        "learning rate",
        "images per second",
    }
    lines = (trained / "teacher" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert events.Scalars("loss")[-1].value == pytest.approx(last["loss"], rel=1e-5)


def test_curves_need_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'sqakd-deploy\[tensorboard\]'"):
        teach(RunConfig(tensorboard=True))
    assert not Path("runs").exists()


# -- going on ------------------------------------------------------------------------------------


class _Stops(Listener):
    """A person who loses patience."""

    def advance(self, done: int, step: object = None) -> None:
        if done == 5 and step is not None:
            raise KeyboardInterrupt


def test_an_interrupted_teacher_goes_on_to_the_same_weights() -> None:
    settings = {
        "model": {"name": SMALL},
        "teacher": {"epochs": 2},
        "distillation": {"save_seconds": 0},
    }
    config = RunConfig.parse(settings)
    whole = teach(config, output=Path("whole"))
    with pytest.raises(KeyboardInterrupt):
        teach(config, output=Path("stopped"), listener=_Stops())
    assert open_run(Path("stopped")).status == "interrupted"
    resumed = teach(resume=Path("stopped"))
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    assert resumed.score == whole.score


class _Hears(_Stops):
    """And who reads what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def _write_photos(folder: Path) -> None:
    for index, image in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8))):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(folder / "ab"[index % 2] / f"{index:02}.png")


@pytest.mark.parametrize("change", ["none", "one more", "renamed"])
def test_it_is_said_that_a_run_goes_on_with_other_images(change: str, tmp_path: Path) -> None:
    photos, listener = tmp_path / "photos", _Hears()
    _write_photos(photos)
    settings = {
        "model": {"name": SMALL},
        "data": {"source": str(photos)},
        "teacher": {"epochs": 3, "batch_size": 8},
    }
    with pytest.raises(KeyboardInterrupt):
        teach(RunConfig.parse(settings), output=Path("stopped"), listener=listener)
    if change == "one more":
        copyfile(photos / "a" / "00.png", photos / "a" / "99.png")
    elif change == "renamed":
        (photos / "b" / "01.png").rename(photos / "b" / "98.png")
    assert not any("have changed" in text for text in listener.said)
    with pytest.raises(KeyboardInterrupt):
        teach(resume=Path("stopped"), listener=listener)
    found = [text for text in listener.said if "have changed since the run began" in text]
    assert len(found) == (change != "none")


@pytest.mark.parametrize("change", ["none", "one more", "limited", "elsewhere"])
def test_it_is_said_that_a_run_is_scored_on_other_images(change: str, tmp_path: Path) -> None:
    photos, listener = tmp_path / "photos", _Hears()
    _write_photos(photos)
    settings = {"model": {"name": SMALL}, "data": {"source": str(photos)}, "teacher": {"epochs": 1}}
    teach(RunConfig.parse(settings), output=Path("done"))
    if change != "none":
        copyfile(photos / "a" / "00.png", photos / "a" / "99.png")
    limit = 2 if change == "limited" else None
    other = copytree(photos, tmp_path / "other") if change == "elsewhere" else photos
    config = DataConfig(source=str(other))
    score_run("done", config, limit, listener)
    found = [text for text in listener.said if "have changed since the run was trained" in text]
    assert len(found) == (change == "one more")


def test_each_kind_of_run_is_resumed_by_its_own_command(trained: Path) -> None:
    for kind, other, command in (
        ("teacher", "student", "teacher"),
        ("student", "teacher", "train"),
    ):
        stopped = Path(f"stopped-{kind}")
        copytree(trained / kind, stopped)
        open_run(stopped).update(status="interrupted")
        with pytest.raises(SpecError, match=f"trains a {kind}; go on with 'sqakd-deploy {command}"):
            reopen(stopped, other)
        reopen(stopped, kind)
    refused = run("teacher", "--resume", str(trained / "teacher"), "--lr", "0.1")
    assert refused.exit_code == 2
    assert "give no others" in refused.stderr


def test_what_to_do_with_a_complete_run(trained: Path) -> None:
    for kind in ("student", "teacher"):
        with pytest.raises(
            SpecError, match=r"teacher is complete; .*--weights .*teacher\.safetensors"
        ):
            reopen(trained / "teacher", kind)
        with pytest.raises(SpecError, match=r"student is complete; .*sqakd-deploy export .*--run"):
            reopen(trained / "student", kind)


# -- bad input -----------------------------------------------------------------------------------


def grey(folder: Path) -> None:
    flat(folder)
    for path in folder.iterdir():
        with Image.open(path) as image:
            converted = image.convert("L")
        converted.save(path)


def flat(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("teacher", "--data", "flat"), 4, "have no labels"),
        (("eval", "nothing.onnx"), 7, "there is no file nothing.onnx"),
        (("eval", "bad.onnx"), 7, "is no ONNX file"),
        (("eval", "flat"), 5, "is no run folder"),
        (("eval", "nothing.pth"), 5, "nothing.pth"),
        (("teacher", "--schedule", "step"), 2, "one-cycle"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: tuple[str, ...], code: int, words: str) -> None:
    flat(Path("flat"))
    Path("bad.onnx").write_bytes(b"\xff" * 40)
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert not Path("runs").exists()


def test_data_of_other_classes_is_refused(trained: Path) -> None:
    model = onnx.load(trained / "model.onnx")
    for entry in model.metadata_props:
        if entry.key == "sqakd.classes":
            entry.value = json.dumps(list("abcdefghij"))
    onnx.save(model, "other.onnx")
    with pytest.raises(DataError, match="'a' against '0'"):
        score_file(Path("other.onnx"), RunConfig())


def test_a_file_without_metadata_is_scored_on_images_that_fit_and_says_on_which(
    trained: Path,
) -> None:
    model = onnx.load(trained / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, "foreign.onnx")
    done = run("eval", "foreign.onnx")
    assert (done.exit_code, "scoring on 360 held-out images of digits" in done.stderr) == (0, True)
    height = model.graph.input[0].type.tensor_type.shape.dim[2]
    height.dim_value = 32
    onnx.save(model, "foreign.onnx")
    with pytest.raises(DataError, match=r"^foreign.onnx takes images \(1, 32, 8\), those of"):
        score_file(Path("foreign.onnx"), RunConfig())


def test_a_run_on_unlabelled_images_cannot_be_scored(trained: Path) -> None:
    flat(Path("flat"))
    with pytest.raises(DataError, match="have no labels"):
        score_run(open_run(trained / "student"), DataConfig(source="flat"))


def test_a_run_is_not_scored_on_other_classes(trained: Path) -> None:
    for name in ("0", "seven"):
        flat(Path("other") / name)
    with pytest.raises(DataError, match=r"'1' against 'seven'"):
        score_run(open_run(trained / "student"), DataConfig(source="other"))


def test_eval_of_a_run_takes_the_options_of_other_images(trained: Path) -> None:
    for name in "0123456789":
        flat(Path("tens") / name)
    (Path("tens") / "0" / "cut.png").write_bytes(b"no image")
    refused = run("eval", str(trained / "student"), "--data", "tens")
    assert (refused.exit_code, "--skip-bad-images" in refused.stderr) == (4, True)
    done = run("eval", str(trained / "student"), "--data", "tens", "--skip-bad-images")
    assert done.exit_code == 0, done.output
    assert "scoring on 9 held-out images of tens" in done.stderr
    sized = run("eval", str(trained / "student"), "--input-size", "16", "16")
    assert (sized.exit_code, "leave out --input-size" in sized.stderr) == (2, True)


def test_classes_that_are_not_the_datas(tmp_path: Path) -> None:
    few = run("train", *ANY, "--model-arg", "num_classes=5", "--epochs", "0", "--output", "few")
    assert few.exit_code == 2
    assert "those of digits mean something else to the model (5 classes against 10)" in few.stderr
    assert not Path("few").exists()
    save_weights(build_model(SMALL, num_classes=12, in_channels=1), tmp_path / "w.safetensors")
    more = (*ANY, "--model-arg", "num_classes=12", "--weights", "w.safetensors", "--epochs", "0")
    done = run("train", *more, "--output", "more", "--json")
    assert done.exit_code == 0, done.output
    assert "labels would mean something else" in done.stderr
    for command in (("train", *more, "--loss", "ce"), ("teacher", *more[:6], "--epochs", "1")):
        refused = run(*command, "--output", "refused")
        assert (
            refused.exit_code,
            "(12 classes against 10); leave num_classes out" in refused.stderr,
        ) == (2, True)
    result = json.loads(done.stdout)
    assert (result["teacher_top1"], result["student_top1"]) == (None, None)
    exported = run("export", "model.onnx", "--run", "more")
    assert exported.exit_code == 0, exported.output
    assert "accuracy" not in exported.stdout
    metadata = {entry.key for entry in onnx.load("model.onnx").metadata_props}
    assert "sqakd.preprocessing" in metadata
    assert "sqakd.classes" not in metadata


def test_a_teacher_starts_from_weights_of_other_classes(tmp_path: Path) -> None:
    """At a rate that moves nothing, all but the last layer is that of the file."""
    trained = build_model(SMALL, num_classes=12, in_channels=1)
    save_weights(trained, tmp_path / "w.safetensors")
    done = run("teacher", *ANY, "--weights", "w.safetensors", "--epochs", "1", "--lr", "1e-12",
               "--output", "own", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tell 12 classes apart: the last layer starts anew" in done.stderr
    found = read_state_dict(Path("own") / "teacher.safetensors")
    assert found["classifier.weight"].shape[0] == 10
    same = {key: value for key, value in found.items() if value.ndim == 4}
    assert set(same) == {"stem.weight", "conv1.weight", "conv2.weight"}
    for key, value in same.items():
        assert torch.allclose(value, trained.state_dict()[key], atol=1e-6), key


def test_a_resumed_run_needs_its_weights_no_more(trained: Path) -> None:
    weights = Path("own.safetensors")
    copyfile(trained / "teacher" / "teacher.safetensors", weights)
    done = run("train", *ANY, "--weights", str(weights), "--epochs", "0", "--output", "student")
    assert done.exit_code == 0, done.output
    facts = json.loads(Path("student/run.json").read_text())
    Path("student/run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    weights.unlink()
    again = run("train", "--resume", "student")
    assert again.exit_code == 0, again.output


# -- what weights bring with them ------------------------------------------------------------------


def test_a_runs_weights_bring_their_network_preprocessing_and_classes(tmp_path: Path) -> None:
    """Nothing of the teacher's run is said again, and its images need no labels."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        for kind in ("train", "test"):
            (tmp_path / "pets" / kind / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / kind / name / f"{number}.png")
    prepared = ("--mean", "0.1,0.2,0.3", "--std", "0.5", "--input-size", "8", "8")
    done = run("teacher", "--data", "pets", *ANY, *prepared, "--epochs", "1",
               "--batch-size", "2", "--output", "own")  # fmt: skip
    assert done.exit_code == 0, done.output
    weights = "own/teacher.safetensors"
    few = ("--epochs", "0", "--weights", weights)
    (tmp_path / "loose").mkdir()
    for file in (tmp_path / "pets").rglob("*.png"):
        copyfile(file, tmp_path / "loose" / f"{file.parent.name}-{file.name}")
    for source, output in (("loose", "student"), ("digits", "others")):
        done = run("train", "--data", source, *few, "--output", output)
        assert done.exit_code == 0, done.output
        facts = open_run(Path(output)).facts["data"]
        assert facts == {**open_run(Path("own")).facts["data"], "name": facts["name"]}
        assert open_run(Path(output)).config.model.name == SMALL
    assert "'cats' against '0'" in done.stderr  # the digits' labels would be the pets'
    assert scores(weights, "--data", "pets")[0] == {
        **scores("own")[0],
        "what": "float model",
    }
    refused = run("eval", weights)
    assert (refused.exit_code, "'cats' against '0'" in refused.stderr) == (4, True)


def test_a_damaged_run_around_weights_is_named(trained: Path, tmp_path: Path) -> None:
    copytree(trained / "teacher", tmp_path / "own")
    (tmp_path / "own" / "run.json").write_text('{"data": {"classes": null}}')
    refused = run("train", "--epochs", "0", "--weights", "own/teacher.safetensors")
    assert refused.exit_code != 0
    assert "own is damaged" in refused.stderr


_NETWORKS = """
import torch
from torch import nn

class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
    def forward(self, x):
        return {"logits": self.conv(x).mean((2, 3))}

def seven():
    return nn.Sequential(nn.Conv2d(1, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def one():
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def maps():
    return nn.Conv2d(1, 10, 3)

def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def background(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes + 1, 3), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten())

def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def still():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

def half():
    return seven().half()

def colour():
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Several", "wanted logits of shape (N, K), one row an image, and for 2 images got a dict"),
        ("maps", "for 2 images got a tensor of shape (2, 10, 6, 6)"),
        ("one", "returns 1 logit an image; wanted two or more"),
        ("still", "has no parameters"),
        (
            "half",
            "wanted parameters in float32, got torch.float16; let its factory",
        ),
        ("seven", "mean something else to the model (7 classes against 10)"),
        ("large", "does not take 8×8 images of 1 channels (RuntimeError"),
        ("colour", "does not take 8×8 images of 1 channels (RuntimeError"),
    ],
)
@pytest.mark.parametrize("command", ["train", "teacher"])
def test_a_model_that_does_not_answer_for_the_classes(
    tmp_path: Path, command: str, factory: str, message: str
) -> None:
    (tmp_path / "net.py").write_text(_NETWORKS)
    refused = run(command, "--model", f"net.py:{factory}", "--epochs", "1", "--output", "own")
    assert refused.exit_code not in (0, 1), refused.output
    assert message in refused.stderr
    assert not Path("own").exists()


def test_labels_of_other_classes_are_not_scored(tmp_path: Path) -> None:
    """A file of more logits than the images have classes would be scored with wrong labels."""
    (tmp_path / "net.py").write_text(_NETWORKS)
    wide = build_model(SMALL, num_classes=12, in_channels=1)
    save_weights(wide, tmp_path / "w.safetensors")
    more = (*ANY, "--model-arg", "num_classes=12", "--weights", "w.safetensors", "--epochs", "0")
    run("train", *more, "--output", "wide")
    run("export", "wide.onnx", "--run", "wide")
    refused = run("eval", "wide.onnx")
    assert (refused.exit_code, "12 classes against 10" in refused.stderr) == (4, True)
    seven = build_model(f"{tmp_path / 'net.py'}:seven", num_classes=7)
    save_weights(seven, tmp_path / "seven.safetensors")
    assert "(digits, since no --data was given)" in refused.stderr
    refused = run("eval", "seven.safetensors", "--model", "net.py:seven")
    assert (refused.exit_code, "7 classes against 10" in refused.stderr) == (4, True)
    assert "(digits, since no --data was given)" in refused.stderr
    refused = run("eval", "seven.safetensors")
    assert refused.exit_code == 5
    assert "error: (resnet20 and digits, since no --model and --data was given) " in refused.stderr


def test_logits_of_another_shape_are_not_scored() -> None:
    with pytest.raises(DataError, match=r"wanted logits of shape \(2, K\).*got \(2, 3, 4\)"):
        score_logits("model", np.zeros((2, 3, 4), np.float32), np.array([0, 1]))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("eval", "{}/student", "--runtime", "openvino"), "--runtime is for .onnx files"),
        (("eval", "{}/model.onnx", "--model", "vgg8"), "holds its whole model; leave out --model"),
        (
            ("train", "--weights", "{}/teacher/teacher.safetensors", "--teacher-epochs", "3"),
            "none is trained: leave out --teacher-epochs",
        ),
        (("train", "--model-arg", "num_classes=0"), "whole number from 2 on, got 0"),
        (("train", "--model-arg", "num_classes=ten"), "whole number from 2 on, got 'ten'"),
        (("train", "--weights", "{}/teacher"), "got a folder; it is a run: name its"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    trained: Path, command: tuple[str, ...], message: str
) -> None:
    refused = run(*(word.format(trained) for word in command))
    assert refused.exit_code not in (0, 1), refused.output
    assert message in refused.stderr


def test_a_factory_may_make_another_number_of_logits(tmp_path: Path) -> None:
    """One more for the background: the run is built again from what its factory was given."""
    (tmp_path / "net.py").write_text(_NETWORKS)
    name = f"{tmp_path / 'net.py'}:background"
    save_weights(build_model(name, num_classes=10, in_channels=1), tmp_path / "w.safetensors")
    for weights, output in (("w.safetensors", "own"), ("own/teacher.safetensors", "again")):
        few = ("--weights", weights, "--epochs", "0", "--output", output)
        done = run("train", "--model", name, *few)
        assert done.exit_code == 0, done.output
        assert open_run(Path(output)).facts["data"]["num_classes"] == 11
        exported = run("export", f"{output}.onnx", "--run", output)
        assert exported.exit_code == 0, exported.output


def test_a_factory_of_its_own_number_of_classes_needs_none(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NETWORKS)
    save_weights(build_model("net.py:seven", num_classes=None), tmp_path / "w.safetensors")
    (tmp_path / "loose").mkdir()
    for number in range(3):
        Image.new("L", (8, 8), number).save(tmp_path / "loose" / f"{number}.png")
    few = ("train", "--data", "loose", "--model", "net.py:seven", "--weights", "w.safetensors")
    done = run(*few, "--epochs", "0", "--output", "own")
    assert done.exit_code == 0, done.output
    refused = run(*few, "--epochs", "0", "--model-arg", "num_classes=5")
    assert refused.exit_code == 6
    assert "unexpected keyword argument 'num_classes'" in refused.stderr


def test_lazy_layers_have_a_shape_before_weights_are_scored(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(_NETWORKS)
    done = run("teacher", "--model", "net.py:lazy", "--epochs", "1", "--output", "own")
    assert done.exit_code == 0, done.output
    assert scores("own/teacher.safetensors")[0]["images"] == 360


def test_arguments_of_a_runs_network_are_kept_but_for_its_classes(tmp_path: Path) -> None:
    common = (*ANY, "--model-arg", "num_classes=10", "--epochs", "1")
    done = run("teacher", *common, "--output", "own")
    assert done.exit_code == 0, done.output
    weights = ("--weights", "own/teacher.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "own", target_is_directory=True)
    linked = ("--weights", "link/teacher.safetensors", "--model-arg", "num_classes=10")
    done = run("train", *linked, "--epochs", "0", "--output", "linked")
    assert done.exit_code == 0, done.output
    assert open_run(Path("linked")).config.model.name == SMALL
    for name in "abc":
        flat(Path("three") / name)
    done = run("teacher", "--data", "three", *weights, "--epochs", "1", "--batch-size", "2",
               "--output", "three-own")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tell 10 other classes apart: the last layer starts anew" in done.stderr


def test_other_classes_of_the_same_number_have_a_last_layer_of_their_own(
    trained: Path, tmp_path: Path
) -> None:
    """At a rate that moves nothing: the digits' names are 0 to 9, these are others."""
    for name in "abcdefghij":
        flat(Path("ten") / name)
    weights, last = trained / "teacher" / "teacher.safetensors", "classifier.weight"
    start = read_state_dict(weights)
    for source, kept in (("ten", False), ("digits", True)):
        done = run("teacher", "--data", source, "--weights", str(weights), "--epochs", "1", "--lr",
                   "1e-12", "--batch-size", "5", "--output", source + "-own")  # fmt: skip
        assert done.exit_code == 0, done.output
        assert ("the last layer starts anew" in done.stderr) is not kept
        found = read_state_dict(Path(source + "-own") / "teacher.safetensors")
        assert torch.allclose(found["conv1.weight"], start["conv1.weight"], atol=1e-6)
        assert torch.allclose(found[last], start[last], atol=1e-6) is kept


def test_a_student_is_no_teacher(trained: Path) -> None:
    for command in ("train", "teacher"):
        refused = run(command, "--weights", str(trained / "student" / "student.safetensors"))
        assert refused.exit_code == 5
        assert f"name its teacher, {trained / 'student' / 'teacher.safetensors'}" in refused.stderr


@pytest.mark.parametrize("facts", ["[]", "{}", '{"data": {}}', "{"])
def test_eval_of_a_damaged_run(trained: Path, tmp_path: Path, facts: str) -> None:
    copytree(trained / "teacher", tmp_path / "own")
    (tmp_path / "own" / "run.json").write_text(facts)
    refused = run("eval", "own")
    assert refused.exit_code == 5, refused.output
    assert "pydantic" not in refused.stderr


def test_images_of_other_channels_than_the_weights(trained: Path) -> None:
    weights = str(trained / "teacher" / "teacher.safetensors")
    for command in (("train", "--weights", weights), ("eval", weights)):
        refused = run(*command, "--channels", "3")
        assert refused.exit_code == 2
        assert "trained on images of 1, got 3; leave --channels out" in refused.stderr


def test_a_teacher_that_goes_on_needs_its_first_weights_no_more(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile(trained / "teacher" / "teacher.safetensors", tmp_path / "w.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr("sqakd_deploy.training.job.train_teacher", _stopped)
        model = {"name": SMALL, "weights": "w.safetensors"}
        config = {"model": model, "teacher": {"epochs": 1, "batch_size": 128}}
        with pytest.raises(KeyboardInterrupt):
            teach(RunConfig.parse(config), output=tmp_path / "own")
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"w\.safetensors does not exist"):
        teach(resume=tmp_path / "own")  # nothing was saved
    (tmp_path / "own" / "last" / "teacher").mkdir(parents=True)
    assert teach(resume=tmp_path / "own").weights.is_file()


def _stopped(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_runs_model_file_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "net.py").write_text(_NETWORKS)
    done = run("teacher", "--model", "code/net.py:lazy", "--epochs", "1", "--output", "own")
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path / "code")
    few = ("--weights", "../own/teacher.safetensors", "--epochs", "0", "--output", "student")
    done = run("train", *few)
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path / "own")
    assert scores("../code/student") != []


@pytest.mark.parametrize("key", ["sqakd.preprocessing", "sqakd.classes"])
def test_metadata_that_are_no_json_are_named(key: str, trained: Path) -> None:
    model = onnx.load(trained / "model.onnx")
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = "{'mean': "
    onnx.save(model, "other.onnx")
    done = run("eval", "other.onnx")
    assert (done.exit_code, f"wanted JSON under '{key}'" in done.stderr) == (7, True)


def test_weights_that_are_not_finite_score_nothing(trained: Path) -> None:
    state = read_state_dict(trained / "teacher" / "teacher.safetensors")
    next(t for t in state.values() if t.is_floating_point()).view(-1)[0] = np.nan
    torch.save(state, "w.pt")
    for command in (("eval", "w.pt"), ("train", "--epochs", "0", "--weights", "w.pt")):
        done = run(*command, *ANY)
        assert (done.exit_code, "that are not finite" in done.stderr) == (5, True), done.output


def test_a_teachers_run_has_no_student_to_export(trained: Path) -> None:
    weights = trained / "teacher" / "teacher.safetensors"
    for command in (("export", "m.onnx"), ("verify", str(trained / "model.onnx"))):
        done = run(*command, "--run", str(trained / "teacher"))
        assert done.exit_code == 5, done.output
        assert (
            f"a teacher's run, which has no student; train one from it: 'sqakd-deploy train "
            f"--weights {weights}'" in done.stderr
        )


def test_a_stopped_run_says_how_to_go_on(trained: Path) -> None:
    copytree(trained / "student", "stopped")
    Path("stopped", "student.safetensors").unlink()
    run_of = open_run("stopped")
    with pytest.raises(CheckpointError, match="though the run is complete; train it anew"):
        load_student(run_of)
    run_of.update(status="interrupted")
    with pytest.raises(CheckpointError, match="go on with 'sqakd-deploy train --resume stopped'"):
        load_student("stopped")


def test_eval_of_unlabelled_images_does_not_advise_training(trained: Path) -> None:
    flat(Path("flat"))
    done = run("eval", str(trained / "model.onnx"), "--data", "flat")
    assert done.exit_code == 4
    assert "scores need: give --data a tree of class folders" in done.stderr
    assert "--loss" not in done.stderr

"""What each command does once its options are parsed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

import sqakd_deploy.training.train as training
from sqakd_deploy.abilities import check_form
from sqakd_deploy.api import check_folder, export_proven, would_change
from sqakd_deploy.bench.inputs import metadata_of
from sqakd_deploy.checkpoint import CONFIG, TEACHER, Run, newest_run, open_run, own_run
from sqakd_deploy.config import DataConfig, RunConfig, load_config, merge
from sqakd_deploy.consoles import console, print_json, show
from sqakd_deploy.errors import CheckpointError, DataError, ModelError, SpecError
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.origin import origin_of
from sqakd_deploy.parity import Tolerance
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.progress import listener_for
from sqakd_deploy.report import score_table, train_table
from sqakd_deploy.runs import check_images, held_out, load_student
from sqakd_deploy.scoring import score_file, score_run, score_weights
from sqakd_deploy.spec import parse_bits
from sqakd_deploy.training.teaching import teach
from sqakd_deploy.verification.reference import save_reference as write_reference
from sqakd_deploy.verification.showing import parity_parts
from sqakd_deploy.verification.student import reference_of


def _consoles() -> tuple[Console, Console]:
    """Results go to stdout, everything else to stderr."""
    return console(), console(stderr=True)


def train(
    settings: dict[str, Any],
    *,
    config: Path | None,
    output: Path | None,
    resume: Path | None,
    bits: str | None,
    method: str | None,
    per_channel: bool | None,
    delta: str | None,
    as_json: bool,
) -> None:
    """Run the main job and print its table."""
    given = settings or config or output or bits or method or delta or per_channel is not None
    if resume is not None and given:
        raise _own_settings(resume, "train")
    both: dict[str, Any] = {"weights": {}, "activations": {}}
    if bits is not None:
        both["weights"]["bits"], both["activations"]["bits"] = parse_bits(bits)
    if method is not None:
        both["weights"]["method"] = both["activations"]["method"] = method
    if per_channel is not None:
        both["weights"]["per_channel"] = per_channel
    if delta is not None:
        settings = merge(settings, {"distillation": {"delta": _number(delta)}})
    resolved = load_config(config, merge({"quantization": both}, settings))
    if "teacher" in settings and resolved.model.weights is not None:
        option = f"--teacher-{min(settings['teacher'])}"
        raise SpecError(f"--weights names a teacher, so that none is trained: leave out {option}")
    out, progress = _consoles()
    listener = listener_for(progress)
    if resume is not None:
        result = training.train(resume=resume, listener=listener)
    else:
        result = training.train(resolved, output=output, listener=listener)
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(train_table(result))


def _own_settings(run: Path, command: str) -> SpecError:
    """That a run which goes on takes no settings, and how another with its settings begins."""
    refusal = "--resume goes on with the run's own settings; give no others"
    if not (run / CONFIG).is_file():
        return SpecError(refusal)
    parts = [command, "--config", str(run / CONFIG)]
    if (run / TEACHER).is_file():
        parts += ["--weights", str(run / TEACHER)]
    return SpecError(
        f"{refusal}. What is to be otherwise takes a new run: `sqakd-deploy {shlex.join(parts)}` "
        "and the other settings"
    )


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def teacher(
    settings: dict[str, Any],
    *,
    config: Path | None,
    output: Path | None,
    resume: Path | None,
    as_json: bool,
) -> None:
    """Train a float model and print its score."""
    if resume is not None and (settings or config or output):
        raise _own_settings(resume, "teacher")
    out, progress = _consoles()
    listener = listener_for(progress)
    if resume is not None:
        result = teach(resume=resume, listener=listener)
    else:
        result = teach(load_config(config, settings), output=output, listener=listener)
    if not PartialState().is_main_process:
        return
    if as_json:
        print_json(result.to_dict())
        return
    out.print(score_table([result.score]))
    out.print(f"wrote {result.weights}", highlight=False, soft_wrap=True)


def evaluate(
    what: Path,
    settings: dict[str, Any],
    *,
    samples: int | None,
    runtime: str | None,
    as_json: bool,
) -> None:
    """Score whatever ``what`` is."""
    out, progress = _consoles()
    listener = listener_for(progress)
    if runtime is not None and what.suffix != ".onnx":
        raise SpecError(f"{what}: --runtime is for .onnx files; leave it out")
    if what.is_dir():
        run = open_run(what)
        scores = score_run(run, _other_images(run, settings), samples, listener)
    elif what.suffix == ".xml":
        raise SpecError(f"{what}: wanted a run, weights or an .onnx file, got OpenVINO IR")
    elif what.suffix == ".onnx":
        if settings.get("model"):
            raise SpecError(f"{what} holds its whole model; leave out --model and --model-arg")
        named = "source" in settings.get("data", {})
        whole = settings if named else merge(_own_images(what), settings)
        config, chosen = load_config(None, whole), runtime or "onnxruntime"
        with _naming_defaults(what, settings, config):
            scores = [score_file(what, config, runtime=chosen, limit=samples, listener=listener)]
    else:
        with_weights = merge(settings, {"model": {"weights": str(what)}})
        config = load_config(None, with_weights)
        unknown = origin_of(config.model).model is None
        with _naming_defaults(what, settings, config, of_model=unknown):
            scores = [score_weights(config, samples, listener)]
    if as_json:
        print_json([asdict(score) for score in scores])
    else:
        out.print(score_table(scores))


def _own_images(file: Path) -> dict[str, Any]:
    """The images of the run that a file was exported from, as settings; none if it is not found."""
    try:
        run = own_run(metadata_of(file), file)
    except (CheckpointError, ModelError):
        return {}
    check_images(run)
    data = run.config.data
    kept = ("source", "skip_bad_images", "cache", "max_cache_gb", "workers")
    return {"data": {name: getattr(data, name) for name in kept}}


@contextmanager
def _naming_defaults(
    what: Path, settings: dict[str, Any], config: RunConfig, *, of_model: bool = False
) -> Iterator[None]:
    """Where a file and images do not go together, say which of it is what nobody named."""
    taken = {}
    if of_model and "name" not in settings.get("model", {}):
        taken["--model"] = config.model.name
    if "source" not in settings.get("data", {}):
        taken["--data"] = config.data.source
    try:
        yield
    except (CheckpointError, DataError, ModelError) as error:
        if not taken or not what.exists():
            raise
        options, names = " and ".join(taken), " and ".join(taken.values())
        raise type(error)(f"({names}, since no {options} was given) {error}") from error


def _other_images(run: Run, settings: dict[str, Any]) -> DataConfig:
    """A run's images, as settings change them."""
    if settings.get("model"):
        raise SpecError(f"{run.path} is a run, which knows its model; leave out --model and others")
    given = settings.get("data", {})
    prepared = {"input_size", "channels", "mean", "std"} & given.keys()
    if prepared:
        option = "--" + min(prepared).replace("_", "-")
        raise SpecError(
            f"{run.path} is a run, which knows how images are prepared; leave out {option}"
        )
    return DataConfig.parse(merge(run.config.data.model_dump(), given))


def export(
    path: Path,
    *,
    run: Path | None,
    data: str | None,
    samples: int,
    min_agreement: float,
    max_accuracy_gap: float,
    max_mean_error: float,
    target: str | None,
    anyway: bool,
    save_reference: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Export a run, print the proof, fail if there is none."""
    out, progress = _consoles()
    for file in filter(None, (path, save_reference)):  # before anything takes time
        check_folder(file)
    how = ExportOptions(**options)
    opened = open_run(run) if run else newest_run()
    check_form(get_exporter(target or opened.config.quantization.target), path, how.opset)
    loaded = load_student(opened)
    listener_for(progress).message(f"exporting {loaded.run.path} ({loaded.run.status})")
    images, split = held_out(loaded, data, samples)
    if target is not None and anyway:
        for line in would_change(loaded.student, target):
            listener_for(progress).message(f"trained for {target}, {line}")
    artifact, report = export_proven(
        loaded.student,
        path,
        images,
        labels=split.labels,
        tolerance=Tolerance(min_agreement, max_accuracy_gap, max_mean_error),
        target=target,
        anyway=anyway,
        options=how,
        metadata=loaded.metadata,
    )
    if save_reference is not None and not report.failures:  # before a reader can close stdout
        answers = reference_of(
            loaded.student, images, labels=split.labels, metadata=loaded.metadata
        )
        write_reference(answers, save_reference)
    if as_json:
        facts = {"path": str(path), "run": str(loaded.run.path)}
        facts["input"] = artifact.input_form
        print_json(facts | report.to_dict())
    else:
        show(out, [*parity_parts(report), f"input {artifact.input_form}"])
    report.raise_for_failures()
    if not as_json:
        out.print(f"wrote {artifact.path}", highlight=False, soft_wrap=True)

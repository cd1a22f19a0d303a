"""Scores on labelled images: of a run, of a float model's weights, or of an exported file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from sqakd_deploy.checkpoint import CHECKSUM, TEACHER, Run, opened
from sqakd_deploy.config import DataConfig, RunConfig
from sqakd_deploy.data import ImageData, Preprocessing
from sqakd_deploy.errors import CheckpointError, DataError, ExportError, SpecError
from sqakd_deploy.evaluate import Logits, accuracy, predict
from sqakd_deploy.listening import Listener
from sqakd_deploy.lowering.exact import as_deployed
from sqakd_deploy.models import load_any_weights
from sqakd_deploy.models.outputs import count_logits
from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.origin import origin_in, origin_of
from sqakd_deploy.pixels import PREPROCESSING_KEY
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.preparing import build, check_there, load
from sqakd_deploy.runs import check_images, load_student, load_teacher, still_batches


@dataclass(frozen=True)
class Score:
    """How good answers are.

    Attributes:
        what: whose answers.
        images: how many.
        top1: the right class came first (percent).
        top5: it was among the first five (percent); None with five classes or fewer.
        loss: mean cross-entropy (nats).
    """

    what: str
    images: int
    top1: float
    top5: float | None
    loss: float


def score_logits(what: str, logits: Logits, labels: NDArray[np.int64]) -> Score:
    """Score answers.

    Args:
        what: whose they are.
        logits: ``(N, K)``.
        labels: ``(N,)``.

    Raises:
        DataError: if there is a label without a logit, or the answers are no such table.
    """
    if logits.ndim != 2 or len(logits) != len(labels):
        raise DataError(
            f"{what}: wanted logits of shape ({len(labels)}, K), one row an image, "
            f"got {logits.shape}; it is no classifier of these images"
        )
    classes = logits.shape[1]
    if labels.max(initial=0) >= classes:
        raise DataError(
            f"the images have labels up to {labels.max()}, the {what} knows {classes} classes: "
            "this is other data than it was trained on"
        )
    true = torch.from_numpy(labels)
    loss = float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), true))
    top5 = None
    if classes > 5:
        best = torch.from_numpy(logits).topk(5, dim=1).indices
        top5 = float(100 * (best == true[:, None]).any(dim=1).double().mean())
    return Score(what, len(labels), accuracy(logits, labels), top5, loss)


def score_run(
    run: Run | Path | str,
    config: DataConfig | None = None,
    limit: int | None = None,
    listener: Listener | None = None,
) -> list[Score]:
    """Score a run's student and teacher on its held-out images, or on other data.

    Args:
        run: the folder, opened or not; a teacher's run has one model.
        config: of other images; the run's own by default.
        limit: at most so many images.
        listener: hears of the progress.

    Raises:
        SqakdError: if the run is damaged, or the images have no labels or are of other classes.
    """
    run = opened(run)
    origin = origin_in(run)
    if origin is None:
        raise CheckpointError(f"run {run.path} was stopped before it read its images; train anew")
    own = run.config.data
    wanted = run.config.model_copy(update={"data": config or own})
    listener = listener or Listener()
    if wanted.data.source == own.source:
        check_images(run)
    data = _labelled(wanted, origin.preprocessing, limit, listener)
    facts = run.facts["data"]
    _same_classes(data, str(run.path), facts["classes"], facts["num_classes"])
    before = run.facts.get(CHECKSUM)
    comparable = limit is None and wanted.data.source == own.source
    if comparable and before not in (None, data.checksum):
        listener.message(
            f"the images of {data.name} have changed since the run was trained: the held-out part "
            "is another, and may hold images that were trained on"
        )
    scores = []
    if run.kind == "student":
        scores.append(_score("student", as_deployed(load_student(run).student), data))
    if (run.path / TEACHER).exists() or not scores:
        scores.append(_score("teacher", load_teacher(run)[0], data))
    return scores


def score_weights(
    config: RunConfig, limit: int | None = None, listener: Listener | None = None
) -> Score:
    """Score a float model's weights.

    Args:
        config: its ``model``, with weights, and ``data``.
        limit: at most so many images.
        listener: hears of the progress.

    Raises:
        SqakdError: if the weights do not fit or the images have no labels.
    """
    weights = config.model.weights
    if weights is None:
        raise SpecError("wanted a file of weights to score, got none")
    origin = origin_of(config.model)
    config = config.model_copy(update={"model": origin.completed(config.model)})
    check_there(config.model)
    data = _labelled(config, origin.preprocessing, limit, listener)
    model, _ = build(config, data, origin)
    image = (data.preprocessing.channels, *data.preprocessing.input_size)
    classes = count_logits(model, config.model.name, image)  # lazy layers have a shape then
    told = (listener or Listener()).message
    load_any_weights(model, config.model.name, weights, message=told)
    _refuse(origin.difference(data, classes), data, weights)
    return _score("float model", model, data)


def score_file(
    path: Path | str,
    config: RunConfig,
    *,
    runtime: str = "onnxruntime",
    limit: int | None = None,
    listener: Listener | None = None,
) -> Score:
    """Score an exported file in a runtime.

    Args:
        path: of the file; its own preprocessing is used where it carries one, as files written
            here do.
        config: its ``data``; size, mean and standard deviation win over the file's.
        runtime: that runs the file.
        limit: at most so many images.
        listener: hears of the progress.

    Raises:
        ExportError: if it is no such file, says no JSON where it should, or the runtime refuses it.
        SpecError: if other channels are asked for than it takes.
        DataError: if the images have no labels, are of other classes, or have another shape than a
            file takes that does not say how they are prepared.
    """
    path = Path(path)
    model = read_onnx(path, weights=False)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    given = _stated(facts, PREPROCESSING_KEY, path)
    preprocessing = None if given is None else _preprocessing(given, str(path))
    classes = _class_names(_stated(facts, "sqakd.classes", path), path)
    if preprocessing is not None and config.data.channels not in (None, preprocessing.channels):
        raise SpecError(
            f"channels: {path.name} takes images of {preprocessing.channels}, got "
            f"{config.data.channels}; leave out --channels"
        )
    data = _labelled(config, preprocessing, limit, listener)
    _same_classes(data, path.name, classes)
    if preprocessing is None:
        _same_shape(data, path.name, model)
    session = get_runtime(runtime).open(path)
    batches = still_batches(data.test, data.preprocessing)
    logits = np.concatenate([session.run(batch.numpy()) for batch in batches])
    _refuse(data.difference(None, logits.shape[-1]), data, path.name)
    return score_logits(runtime, logits, data.test.need_labels())


def _score(what: str, model: torch.nn.Module, data: ImageData) -> Score:
    logits = predict(model, still_batches(data.test, data.preprocessing))
    return score_logits(what, logits, data.test.need_labels())


def _labelled(
    config: RunConfig,
    preprocessing: Preprocessing | None,
    limit: int | None,
    listener: Listener | None,
) -> ImageData:
    listener = listener or Listener()
    data = load(config, listener, preprocessing=preprocessing, limit=limit)
    if data.test.labels is None:
        raise DataError(
            f"{data.name}: these images have no labels, which scores need: give --data a tree of "
            "class folders"
        )
    listener.message(f"scoring on {len(data.test)} held-out images of {data.name}")
    return data


def _preprocessing(values: object, where: str) -> Preprocessing:
    try:
        return Preprocessing.model_validate(values)
    except ValidationError as error:
        raise DataError(f"{where} does not say how its images are prepared: {error}") from error


def _same_shape(data: ImageData, what: str, model: onnx.ModelProto) -> None:
    """Refuse images of another shape than the input of a file that does not say how to prepare
    them."""
    weights = {tensor.name for tensor in model.graph.initializer}
    sources = [source for source in model.graph.input if source.name not in weights]
    dims = sources[0].type.tensor_type.shape.dim[1:] if sources else ()
    wanted = [dim.dim_value or None for dim in dims]
    got = [data.preprocessing.channels, *data.preprocessing.input_size]
    if len(wanted) == len(got) and any(
        a not in (None, b) for a, b in zip(wanted, got, strict=True)
    ):
        shown = ", ".join(str(extent or "any") for extent in wanted)
        raise DataError(
            f"{what} takes images ({shown}), those of {data.name} are {tuple(got)}; give --data, "
            "--channels or --input-size"
        )


def _stated(facts: dict[str, str], key: str, path: Path) -> Any:
    """What a file says under a key of its metadata; None where it says nothing."""
    try:
        return json.loads(facts.get(key) or "null")
    except ValueError as error:
        raise ExportError(
            f"{path}: wanted JSON under {key!r} in its metadata, got {error}; export it again"
        ) from error


def _class_names(stated: Any, path: Path) -> list[str] | None:
    if stated is None:
        return None
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ExportError(
            f"{path}: wanted a list of names under 'sqakd.classes' in its metadata, got "
            f"{type(stated).__name__}; export it again"
        )
    return stated


def _same_classes(
    data: ImageData, what: str, names: Sequence[str] | None, count: int | None = None
) -> None:
    _refuse(data.difference(names, count), data, what)


def _refuse(other: str | None, data: ImageData, what: str) -> None:
    """Refuse images whose classes are others than a model's; None is no difference."""
    if other is not None:
        raise DataError(
            f"{data.name} has other classes than {what} was trained on ({other}): its labels "
            "mean something else; give other --data"
        )

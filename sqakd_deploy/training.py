"""The main job: from a config to a run folder, and from a run folder back to a student."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from sqakd_deploy.acceleration import fitting_threads
from sqakd_deploy.checkpoint import (
    LAST,
    STUDENT,
    TEACHER,
    Run,
    create_run,
    load_weights,
    open_run,
)
from sqakd_deploy.config import RunConfig
from sqakd_deploy.data import ImageData, load_data
from sqakd_deploy.data.batches import Batches, LabelledBatches
from sqakd_deploy.data.published import published_preprocessing
from sqakd_deploy.distillation import distill
from sqakd_deploy.errors import SpecError, SqakdError
from sqakd_deploy.exporting import get_exporter
from sqakd_deploy.integer import snap_biases
from sqakd_deploy.listening import Listener, Watch
from sqakd_deploy.models import build_model, load_any_weights
from sqakd_deploy.processes import start
from sqakd_deploy.quantization import is_calibrated, quantize
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.results import TrainResult, score
from sqakd_deploy.runs import keeping_of, still_batches
from sqakd_deploy.saves import Saves
from sqakd_deploy.teacher import train_teacher

T = TypeVar("T")


def train(
    config: RunConfig | None = None,
    *,
    output: Path | None = None,
    resume: Path | None = None,
    listener: Listener | None = None,
) -> TrainResult:
    """Distil a student as a config says, into a run folder.

    Args:
        config: the default trains ResNet-20 on the embedded digits at 4 bits.
        output: the run folder; None picks a free name under ``runs/``.
        resume: a run folder to go on with, by its own config; excludes the two above.
        listener: hears of the progress.

    Raises:
        SqakdError: of the kind that says what is wrong; nothing but the run folder is written.
    """
    if resume is not None:
        return _resume(resume, config, output, listener or Listener())
    config = config or RunConfig()
    _check(config)
    job = _Job(config, listener or Listener())
    return job.run_all(lambda: create_run(config, output))


def _resume(
    folder: Path, config: RunConfig | None, output: Path | None, listener: Listener
) -> TrainResult:
    if config is not None or output is not None:
        raise SpecError("resume: a run goes on with its own config and folder; give no others")
    run = open_run(folder)
    if run.status == "complete":
        raise SpecError(f"resume: {folder} is complete; train a new run, or export this one")
    return _Job(run.config, listener).run_all(lambda: run)


def _check(config: RunConfig) -> None:
    """Refuse what can be refused before any work."""
    spec = config.quantization
    for method in (spec.weights.method, spec.activations.method):
        METHODS[method]
    get_exporter(spec.target).check(spec)


class _Job:
    """One process's part in a run; alone, all of it."""

    def __init__(self, config: RunConfig, listener: Listener) -> None:
        self.config = config
        self.accelerator = start(pick_device(config.device))
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.listener = listener if self.main else Listener()
        self.seconds: dict[str, float] = {}
        self.seed = config.distillation.seed

    def run_all(self, open_folder: Callable[[], Run]) -> TrainResult:
        """The whole job; ``open_folder`` is called once everything that can be refused was."""
        torch.manual_seed(self.seed)
        with self.accelerator.local_main_process_first():  # one of a machine's decodes for all
            data = _load(self.config, self.listener)
        model = _build(self.config, data).to(self.device)
        preprocessing, batch = data.preprocessing, self.config.distillation.batch_size
        shape = (batch, preprocessing.channels, *preprocessing.input_size)
        with fitting_threads(model, torch.zeros(shape, device=self.device)):
            return self._run(model, data, open_folder)

    def _run(
        self, model: nn.Module, data: ImageData, open_folder: Callable[[], Run]
    ) -> TrainResult:
        self._check_teacher(model, data)
        self._quantize(model, data)  # a model that cannot be quantised is refused before any work
        run = self._from_main(open_folder)
        run.writable = self.main
        run.update(status="running", data=_data_facts(data, self.config))
        student: nn.Module | None = None
        try:
            self._teacher(model, data, run)
            torch.manual_seed(self.seed)  # a resumed run may not have trained its teacher
            student = self._quantize(model, data)
            self._distill(student, model, data, run)
            run.save(student, STUDENT)
            with self._timed("evaluation"):
                scores = score(student, model, data)
            facts = (run.path, len(data.train.images), self._trains_teacher, self.seconds)
            result = TrainResult(*facts, **scores)
        except KeyboardInterrupt:
            if student is not None and is_calibrated(student):
                snap_biases(student)  # an exact export needs it, however far training came
                run.save(student, STUDENT)
            run.update(status="interrupted", seconds=self.seconds)
            self.listener.message(
                f"interrupted; what there is stays in {run.path}: export it as it is, or go on "
                f"with --resume {run.path}"
            )
            raise
        except SqakdError as error:
            run.update(status="failed", error=str(error), seconds=self.seconds)
            raise
        run.update(status="complete", results=result.to_dict())
        if self.main:
            Saves(run.path / LAST).clear()
        return result

    def _from_main(self, make: Callable[[], T]) -> T:
        """What the first process makes, or the error it raised, in every process."""
        box: list[Any] = [None]
        if self.main:
            try:
                box[0] = make()
            except SqakdError as error:
                box[0] = error
        broadcast_object_list(box)
        if isinstance(box[0], SqakdError):
            raise box[0]
        made: T = box[0]
        return made

    def _quantize(self, model: nn.Module, data: ImageData) -> nn.Module:
        shape = (data.preprocessing.channels, *data.preprocessing.input_size)
        return quantize(model, self.config.quantization, example=shape)

    @property
    def _trains_teacher(self) -> bool:
        return self.config.model.weights is None

    def _check_teacher(self, model: nn.Module, data: ImageData) -> None:
        wanted = self.config.model
        if wanted.weights is not None:
            load_any_weights(model, wanted.name, wanted.weights)
        elif data.train.labels is None:
            raise SpecError(
                f"no teacher: {self.config.data.source} has no labels to train one with; "
                "name a file of trained weights with --weights"
            )

    def _teacher(self, model: nn.Module, data: ImageData, run: Run) -> None:
        if (run.path / TEACHER).exists():  # resumed
            load_weights(model, run.path / TEACHER)
        elif self._trains_teacher:
            self._train_teacher(model, data, run)
        run.save(model.eval(), TEACHER)
        self.accelerator.wait_for_everyone()

    def _train_teacher(self, model: nn.Module, data: ImageData, run: Run) -> None:
        self.listener.message(
            "no teacher given (--weights): training one in full precision first. "
            "Labels are used for this step only."
        )
        config = self.config.teacher
        batches = self._labelled(data, config.batch_size)
        with self._timed("teacher"), Watch(self.listener, run, "teacher") as watch:
            self.listener.start("teacher", config.epochs * len(batches))
            train_teacher(
                model,
                batches,
                config,
                acceleration=self.config.distillation,
                saves=self._saves(run, "teacher"),
                on_step=watch.on_step,
                on_epoch=watch.on_epoch,
                message=self.listener.message,
            )

    def _distill(self, student: nn.Module, teacher: nn.Module, data: ImageData, run: Run) -> None:
        config = self.config.distillation
        labelled = None if config.loss == "kl" else self._labelled(data, config.batch_size)
        batches = self._batches(data, config.batch_size)
        if not config.epochs:
            self.listener.message("0 epochs: the student is calibrated, not trained")
        with self._timed("student"), Watch(self.listener, run, "student") as watch:
            self.listener.start("student", config.epochs * len(batches))
            distill(
                student,
                batches,
                teacher=teacher,
                config=config,
                # every process calibrates on the same images, so that all find the same ranges
                calibration=still_batches(data.train, data.preprocessing, shuffle_seed=self.seed),
                labelled=labelled,
                saves=self._saves(run, "student"),
                on_step=watch.on_step,
                on_epoch=watch.on_epoch,
                message=self.listener.message,
            )

    def _saves(self, run: Run, part: str) -> Saves:
        seconds = self.config.distillation.save_seconds
        return Saves(run.path / LAST / part, seconds, self.listener.message)

    def _batches(self, data: ImageData, batch_size: int) -> Batches:
        return Batches(
            data.train.images,
            data.preprocessing,
            batch_size,
            seed=self.seed,
            augmentation=data.augmentation,
            drop_last=True,  # one shape for compiled graphs, equal parts for processes
            device=self.device,
            shard=(self.accelerator.process_index, self.accelerator.num_processes),
        )

    def _labelled(self, data: ImageData, batch_size: int) -> LabelledBatches:
        return LabelledBatches(self._batches(data, batch_size), data.train.need_labels())

    def _timed(self, part: str) -> _Timer:
        return _Timer(self.seconds, part)


class _Timer:
    """Notes how long a block took, also when it fails."""

    def __init__(self, into: dict[str, float], part: str) -> None:
        self._into, self._part = into, part

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._into[self._part] = round(time.perf_counter() - self._start, 2)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        SpecError: if a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("device: wanted cuda, but torch sees no GPU; use --device cpu")
    use_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")


def _load(config: RunConfig, listener: Listener) -> ImageData:
    source = config.data

    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            listener.start("images", total)
        started = True
        listener.advance(done)

    data = load_data(
        source.source,
        input_size=source.input_size,
        mean=source.mean,
        std=source.std,
        skip_bad_images=source.skip_bad_images,
        progress=progress,
        preprocessing=published_preprocessing(config.model.name, config.model.weights),
        augmentation=source.augmentation,
        keeping=keeping_of(source),
        message=listener.message,
    )
    if started:
        listener.finish()
    if data.skipped:
        listener.message(f"skipped {len(data.skipped)} unreadable images: {_some(data.skipped)}")
    return data


def _some(names: tuple[str, ...], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _build(config: RunConfig, data: ImageData) -> nn.Module:
    args = dict(config.model.args)
    classes = args.pop("num_classes", None) or data.num_classes
    if classes is None:
        raise SpecError(
            f"{config.data.source} has no labels, so the number of classes is unknown; "
            "give it with --model-arg num_classes=K"
        )
    return build_model(
        config.model.name,
        num_classes=classes,
        in_channels=data.preprocessing.channels,
        args=args,
    )


def _data_facts(data: ImageData, config: RunConfig) -> dict[str, Any]:
    classes = config.model.args.get("num_classes") or data.num_classes
    return {
        "name": data.name,
        "num_classes": classes,
        "classes": list(data.classes) if data.classes else None,
        "preprocessing": data.preprocessing.model_dump(mode="json"),
    }

"""The main job: from a config to a run folder, and from a run folder back to a student."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqakd_deploy.checkpoint import STUDENT, TEACHER, Run, create_run
from sqakd_deploy.config import RunConfig
from sqakd_deploy.data import ImageData, ImageSplit, load_data
from sqakd_deploy.data.batches import Batches, LabelledBatches
from sqakd_deploy.distillation import Epoch, distill
from sqakd_deploy.errors import SpecError, SqakdError
from sqakd_deploy.evaluate import Logits, accuracy, agreement, divergence, predict
from sqakd_deploy.exporting import get_exporter
from sqakd_deploy.integer import lower
from sqakd_deploy.listening import Listener
from sqakd_deploy.models import build_model
from sqakd_deploy.models import load_weights as load_foreign_weights
from sqakd_deploy.parity import expected_size, float_size, information_size
from sqakd_deploy.quantization import count_quantizers, quantize
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.runs import still_batches
from sqakd_deploy.teacher import train_teacher


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        run: the folder.
        label: bits and method, for instance ``w4a4 lsq``.
        teacher_trained: the teacher was trained here, with labels.
        images: training images.
        test_images: held-out images that the figures below are on.
        teacher_top1: percent, None without labels.
        student_top1: percent, None without labels.
        agreement: of student and teacher on the top-1 answer (percent).
        divergence: mean KL from teacher to student (nats).
        quantizers: how many quantizers there are, by bits.
        float_size: of the teacher's weights (bytes).
        file_size: expected of the exported file's weights, scales and biases (bytes).
        information_size: the same with each weight at its own bits (bytes).
        seconds: by part of the job.
    """

    run: Path
    label: str
    teacher_trained: bool
    images: int
    test_images: int
    teacher_top1: float | None
    student_top1: float | None
    agreement: float
    divergence: float
    quantizers: dict[str, dict[int, int]]
    float_size: int
    file_size: int
    information_size: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return asdict(self) | {"run": str(self.run)}


def train(
    config: RunConfig | None = None,
    *,
    output: Path | None = None,
    listener: Listener | None = None,
) -> TrainResult:
    """Distil a student as a config says, into a run folder.

    Args:
        config: the default trains ResNet-20 on the embedded digits at 4 bits.
        output: the run folder; None picks a free name under ``runs/``.
        listener: hears of the progress.

    Raises:
        SqakdError: of the kind that says what is wrong; nothing but the run folder is written.
    """
    config = config or RunConfig()
    _check(config)
    return _Job(config, output, listener or Listener()).run_all()


def _check(config: RunConfig) -> None:
    """Refuse what can be refused before any work."""
    spec = config.quantization
    for method in (spec.weights.method, spec.activations.method):
        METHODS[method]
    get_exporter(spec.target).check(spec)


class _Job:
    def __init__(self, config: RunConfig, output: Path | None, listener: Listener) -> None:
        self.config = config
        self.output = output
        self.listener = listener
        self.seconds: dict[str, float] = {}
        self.device = pick_device(config.device)
        self.seed = config.distillation.seed

    def run_all(self) -> TrainResult:
        torch.manual_seed(self.seed)
        data = _load(self.config, self.listener)
        model = _build(self.config, data).to(self.device)
        trained_here = self._will_train_teacher(data)
        if not trained_here:
            load_foreign_weights(model, Path(str(self.config.model.weights)))
        self._quantize(model, data)  # a model that cannot be quantised is refused before any work
        run = create_run(self.config, self.output)
        run.update(data=_data_facts(data, self.config))
        student: nn.Module | None = None
        try:
            if trained_here:
                self._train_teacher(model, data)
            run.save(model.eval(), TEACHER)
            student = self._quantize(model, data)
            self._distill(student, model, data, run)
            run.save(student, STUDENT)
            result = self._result(student, model, data, run, trained_here)
        except KeyboardInterrupt:
            if student is not None:
                run.save(student, STUDENT)
            run.update(status="interrupted", seconds=self.seconds)
            self.listener.message(f"interrupted; what there is stays in {run.path}")
            raise
        except SqakdError as error:
            run.update(status="failed", error=str(error), seconds=self.seconds)
            raise
        run.update(status="complete", results=result.to_dict())
        return result

    def _quantize(self, model: nn.Module, data: ImageData) -> nn.Module:
        shape = (data.preprocessing.channels, *data.preprocessing.input_size)
        return quantize(model, self.config.quantization, example=shape)

    def _will_train_teacher(self, data: ImageData) -> bool:
        if self.config.model.weights is not None:
            return False
        if data.train.labels is None:
            raise SpecError(
                f"no teacher: {self.config.data.source} has no labels to train one with; "
                "name a file of trained weights with --weights"
            )
        return True

    def _train_teacher(self, model: nn.Module, data: ImageData) -> None:
        self.listener.message(
            "no teacher given (--weights): training one in full precision first. "
            "Labels are used for this step only."
        )
        with self._timed("teacher"):
            config = self.config.teacher
            batches = self._labelled(data, config.batch_size)
            self.listener.start("teacher", config.epochs * len(batches))
            train_teacher(model, batches, config, self.listener.on_step)
            self.listener.finish()

    def _distill(self, student: nn.Module, teacher: nn.Module, data: ImageData, run: Run) -> None:
        config = self.config.distillation
        labelled = None if config.loss == "kl" else self._labelled(data, config.batch_size)
        batches = self._batches(data, config.batch_size)
        with self._timed("student"):
            if config.epochs:
                self.listener.start("student", config.epochs * len(batches))
            else:
                self.listener.message("0 epochs: the student is calibrated, not trained")
            distill(
                student,
                batches,
                teacher=teacher,
                config=config,
                calibration=still_batches(data.train, data.preprocessing, shuffle_seed=self.seed),
                labelled=labelled,
                on_step=self.listener.on_step,
                on_epoch=lambda epoch: _record(run, epoch),
            )
            self.listener.finish()

    def _batches(self, data: ImageData, batch_size: int) -> Batches:
        return Batches(
            data.train.images,
            data.preprocessing,
            batch_size,
            seed=self.seed,
            augmentation=data.augmentation,
            device=self.device,
        )

    def _labelled(self, data: ImageData, batch_size: int) -> LabelledBatches:
        return LabelledBatches(self._batches(data, batch_size), data.train.need_labels())

    def _result(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: ImageData,
        run: Run,
        trained_here: bool,
    ) -> TrainResult:
        with self._timed("evaluation"):
            ours = predict(student, still_batches(data.test, data.preprocessing))
            theirs = predict(teacher, still_batches(data.test, data.preprocessing))
        graph = lower(student.cpu())
        spec = self.config.quantization
        methods = dict.fromkeys([spec.weights.method, spec.activations.method])
        return TrainResult(
            run=run.path,
            label=f"{spec.label} {'/'.join(methods)}",
            teacher_trained=trained_here,
            images=len(data.train.images),
            test_images=len(data.test.images),
            teacher_top1=_top1(theirs, data.test),
            student_top1=_top1(ours, data.test),
            agreement=agreement(ours, theirs),
            divergence=divergence(ours, theirs),
            quantizers=count_quantizers(student),
            float_size=float_size(graph),
            file_size=expected_size(graph),
            information_size=information_size(graph),
            seconds=self.seconds,
        )

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


def _record(run: Run, epoch: Epoch) -> None:
    run.append_metrics(asdict(epoch))


def _top1(logits: Logits, split: ImageSplit) -> float | None:
    return None if split.labels is None else accuracy(logits, split.labels)


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

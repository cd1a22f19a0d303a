"""The main job: from a config to a run folder, and from a run folder back to a student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sqakd_deploy.checkpoint import (
    STUDENT,
    TEACHER,
    Run,
    create_run,
    load_weights,
)
from sqakd_deploy.config import RunConfig
from sqakd_deploy.data import ImageData
from sqakd_deploy.errors import SpecError
from sqakd_deploy.exporting import ProfileExporter
from sqakd_deploy.listening import Listener
from sqakd_deploy.lowering.borders import settle
from sqakd_deploy.lowering.lowerable import without_form
from sqakd_deploy.models import load_any_weights
from sqakd_deploy.plugins import get_exporter, get_runtime
from sqakd_deploy.quantization import is_calibrated, quantize
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.results import TrainResult, score
from sqakd_deploy.runs import still_batches
from sqakd_deploy.spec import DistillConfig, QuantSpec
from sqakd_deploy.training.beginning import Beginning
from sqakd_deploy.training.distillation import check_settings, distill
from sqakd_deploy.training.job import Job, reopen
from sqakd_deploy.training.watch import Watch


def train(
    config: RunConfig | None = None,
    *,
    output: Path | str | None = None,
    resume: Path | str | None = None,
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
    job = _Distillation(config, listener or Listener())
    return job.distil(lambda: create_run(job.config, output))


def _resume(
    folder: Path | str, config: RunConfig | None, output: Path | str | None, listener: Listener
) -> TrainResult:
    if config is not None or output is not None:
        raise SpecError("resume: a run goes on with its own config and folder; give no others")
    run = reopen(folder, "student")
    return _Distillation(run.config, listener, run).distil(lambda: run, run.path / TEACHER)


def _check(config: RunConfig) -> None:
    """Refuse what can be refused before any work."""
    spec = config.quantization
    for method in (spec.weights.method, spec.activations.method):
        METHODS[method]
    exporter = get_exporter(spec.target)
    exporter.check(spec)
    try:  # a student that nothing can prove is worth no training
        get_runtime(exporter.runtime)
    except SpecError as error:
        raise SpecError(f"target {spec.target!r} has no proof here: {error}") from error
    _check_used(config)


def _check_used(config: RunConfig) -> None:
    """Refuse what was set and would do nothing.

    Not in the specs themselves, so that runs which did set it can still be read.
    """
    spec, how = config.quantization, config.distillation
    if how.loss == "ce" and how.temperature != DistillConfig().temperature:
        raise SpecError("temperature: the loss 'ce' has no KL to soften; leave it out")
    methods = (spec.weights.method, spec.activations.method)
    scaled = any(METHODS[method].scales_gradient for method in methods)
    if how.delta != DistillConfig().delta and not scaled:
        raise SpecError(
            f"delta: scales gradients of the method ewgs, and is nothing to {methods[0]}; leave it "
            "out, or take --method ewgs"
        )
    if spec.placement == "paper":
        for name in ("first_last_bits", "residual_bits"):
            if getattr(spec, name) != getattr(QuantSpec(), name):
                raise SpecError(
                    f"{name}: placement 'paper' leaves both ends and all sums in float; leave it "
                    "out, or take --placement target"
                )


def _profile_note(target: str) -> str | None:
    """What to say before training for a runtime that files are not run in."""
    exporter = get_exporter(target)
    if not isinstance(exporter, ProfileExporter):
        return None
    return (
        f"target {target} is a profile: files are checked against the documented rules of "
        f"{exporter.deployed_in}, and not run in it"
    )


class _Distillation(Job):
    """The main job: a teacher, given or trained, and its student."""

    def distil(self, open_folder: Callable[[], Run], teacher: Path | None = None) -> TrainResult:
        """The main job.

        Args:
            open_folder: called once everything that can be refused was.
            teacher: weights that an earlier start of the same run may have kept.
        """
        with self.prepared(self.config.distillation.batch_size) as (model, data):
            if teacher is None or not teacher.exists():
                self._check_teacher(model, data)
            return self._run(model, data, open_folder)

    def _run(
        self, model: nn.Module, data: ImageData, open_folder: Callable[[], Run]
    ) -> TrainResult:
        self._check_student(model, data)
        run = self.opened(open_folder)
        note = _profile_note(self.config.quantization.target)
        if note is not None:
            self.listener.message(note)
        student: nn.Module | None = None

        def keep() -> None:
            use = "go on"
            if student is not None and is_calibrated(student):
                run.save(student, STUDENT)
                settle(student)  # an exact export needs it, however far training came
                run.save(student, STUDENT)
                if without_form(student) is None:
                    use = "export it as it is, or go on"
            self.listener.message(
                f"interrupted; what there is stays in {run.path}: {use} with --resume {run.path}"
            )

        with self.recorded(run, keep):
            self._teacher(model, data, run)
            torch.manual_seed(self.seed)  # a resumed run may not have trained its teacher
            student = self._quantize(model, data)
            beginning = Beginning(model, data)
            self._distill(student, model, data, run, beginning)
            run.save(student, STUDENT)
            with self.timed("evaluation"):
                scores = score(student, model, data)
                regret = beginning.regret(student)
            if regret is not None:
                self.listener.message(regret)
            facts = (run.path, len(data.train.images), self._trains_teacher, self.seconds)
            result = TrainResult(*facts, **scores)
        self.finish(run, result.to_dict())
        return result

    def _quantize(self, model: nn.Module, data: ImageData) -> nn.Module:
        shape = (data.preprocessing.channels, *data.preprocessing.input_size)
        return quantize(model, self.config.quantization, example=shape)

    def _check_student(self, model: nn.Module, data: ImageData) -> None:
        """Refuse what cannot be quantised or trained as asked, before a teacher takes hours."""
        config = self.config.distillation
        steps = len(self._batches(data, config.batch_size))
        check_settings(self._quantize(model, data), model, config, steps)

    @property
    def _trains_teacher(self) -> bool:
        return self.config.model.weights is None

    def _check_teacher(self, model: nn.Module, data: ImageData) -> None:
        wanted = self.config.model
        if wanted.weights is not None:
            load_any_weights(model, wanted.name, wanted.weights, message=self.listener.message)
        elif data.train.labels is None:
            raise SpecError(
                f"no teacher: {self.config.data.source} has no labels to train one with; "
                "name a file of trained weights with --weights"
            )

    def _teacher(self, model: nn.Module, data: ImageData, run: Run) -> None:
        if (run.path / TEACHER).exists():  # resumed
            load_weights(model, run.path / TEACHER)
        elif self._trains_teacher:
            self.listener.message(
                "no teacher given (--weights): training one in full precision first. "
                "Labels are used for this step only."
            )
            self.train_teacher(model, data, run)
        run.save(model.eval(), TEACHER)
        self.accelerator.wait_for_everyone()

    def _distill(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: ImageData,
        run: Run,
        beginning: Beginning,
    ) -> None:
        config = self.config.distillation
        compared = self.main and config.loss == "kl"  # which no label pulls away from the teacher
        labelled = None if config.loss == "kl" else self._labelled(data, config.batch_size)
        batches = self._batches(data, config.batch_size)
        if not config.epochs:
            self.listener.message("0 epochs: the student is calibrated, not trained")
        with self.timed("student"), Watch(self.listener, run, "student") as watch:
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
                on_calibrated=beginning.calibrated if compared else None,
                on_step=watch.on_step,
                on_epoch=watch.on_epoch,
                message=self.listener.message,
            )

"""Self-supervised quantization-aware distillation: the training loop.

Nothing in this file takes a label unless the loss asks for one: with ``loss="kl"`` only the first
element of a batch is touched, and it must be a tensor of images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqakd_deploy.errors import SpecError
from sqakd_deploy.evaluate import batch_agreement
from sqakd_deploy.given import images_in, labels_in, network, setting
from sqakd_deploy.lowering.borders import settle
from sqakd_deploy.lowering.lowerable import without_form
from sqakd_deploy.modes import in_plain_mode
from sqakd_deploy.quantization import (
    batch_norms,
    calibrate,
    input_shape_of,
    is_calibrated,
    reestimate_batch_norm,
)
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.tracing.unwrapping import own_copy
from sqakd_deploy.training.acceleration import decide
from sqakd_deploy.training.batching import as_loader, check_repeatable
from sqakd_deploy.training.features import answers, feature_loss, with_codes
from sqakd_deploy.training.fitting import Epoch, Fit, Loader, Step, warm_cosine
from sqakd_deploy.training.hessian import set_delta, update_deltas
from sqakd_deploy.training.losses import (
    LABELS,
    check_logits,
    distillation_loss,
    label_loss,
    warn_of_probabilities,
)
from sqakd_deploy.training.optimizers import build_optimizer, loses_little
from sqakd_deploy.training.processes import separate_batch_norm, start, synchronised_batch_norm
from sqakd_deploy.training.sampling import holding, sample
from sqakd_deploy.training.saves import Saves

# For statistics of BatchNorm that are better than the model's own. Measured with 0 epochs, as KL
# from the teacher: 22 images of one class gave 0.235 and the model's own 0.048, 240 mixed images
# 0.011 and the model's own 0.045.
_ENOUGH_IMAGES = 128
_DELTA_BATCHES = 3  # as EWGS averages its trace (Lee et al., 2021, §4.1)


@in_plain_mode
def distill(
    student: nn.Module,
    images: Tensor | Loader,
    *,
    teacher: nn.Module,
    config: DistillConfig | None = None,
    calibration: Tensor | Iterable[object] | None = None,
    labelled: Loader | None = None,
    saves: Saves | None = None,
    on_calibrated: Callable[[nn.Module], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    message: Callable[[str], None] | None = None,
) -> list[Epoch]:
    """Train a student to answer like its teacher, without labels.

    Args:
        student: from :func:`~sqakd_deploy.quantization.quantize`; **changed in place**: calibrated
            (unless it is: a student that was trained or calibrated before goes on with its ranges),
            BatchNorm re-estimated (from 128 images on, unless ``bn_images`` are fewer), trained,
            and, where it has integers, its steps moved off borders and biases onto int32's grid
            (:func:`~sqakd_deploy.lowering.borders.settle`).
        images: preprocessed images ``(N, C, H, W)``, or batches of them, gone through once an
            epoch. Of a batch that is a tuple only the first element is used.
        teacher: the float model, in float32; used in evaluation mode, not changed.
        config: how; ``epochs=0`` trains nothing and does all the rest.
        calibration: images that set ranges and BatchNorm, by default some of ``images``. Of a
            tensor evenly spread ones are taken, of batches the first: shuffle those of a loader.
            Where it is given, ranges are set by it, also those of a student that has some.
        labelled: batches ``(images, labels)``, needed by the baselines ``ce`` and ``kl+ce`` alone;
            they replace ``images``.
        saves: where training states are saved, and resumed from if there is one.
        on_calibrated: called with the student before the first step, if there is one.
        on_step: called after each step.
        on_epoch: called after each epoch.
        message: told what was decided.

    Returns:
        A record for each epoch trained here.

    Raises:
        SpecError: if a loss with labels gets none, or labels come with one that needs none, or the
            warm-up is as long as the run.
        DataError: if there are too few images to train or to normalise by, or batches without a
            length, that can be gone through only once, or of anything but finite float32 images
            and, of ``labelled``, a class of the model's for each.
        ModelError: if the teacher does not answer as the student does, by two logits or more.
        TrainingError: if the loss is not finite.
    """
    config, say = config or DistillConfig(), message or (lambda text: None)
    setting(config, DistillConfig, "config")
    network(teacher, "teacher")
    if (config.loss == "kl") != (labelled is None):
        wanted = "no labels" if config.loss == "kl" else "labelled batches"
        raise SpecError(f"loss {config.loss!r} wants {wanted}; give the other or change the loss")
    batches = as_loader(images if labelled is None else labelled, config)
    check_repeatable(calibration)
    formless = without_form(student)
    if formless is not None:
        say(
            f"{formless} has no integer form: the student cannot be exported, and its biases "
            "stay as trained"
        )
    still = calibration if calibration is not None else batches
    if calibration is not None or not is_calibrated(student):
        calibrate(student, sample(still, config.calibration_images))
    records = []
    reestimate = partial(_reestimate, student, still, config, say)
    if config.epochs:
        run = _Distillation(student, teacher, config, batches, say)
        if on_calibrated is not None:
            on_calibrated(student)
        records = run.fit(saves, on_step, on_epoch, reestimate)
    if not frozen_epochs(student, config):
        reestimate()
    settle(student)
    student.eval()
    return records


def check_settings(
    student: nn.Module, teacher: nn.Module, config: DistillConfig, steps: int
) -> None:
    """Refuse what :func:`distill` would, for those who train a teacher before.

    Args:
        student: from :func:`~sqakd_deploy.quantization.quantize`; it need not be calibrated.
        teacher: the float model; it need not be trained.
        config: how.
        steps: of an epoch.

    Raises:
        SpecError: if the warm-up is as long as the run, or there is no layer to compare codes of.
    """
    if config.epochs:
        _check_warmup(config, steps)
        if config.feature_weight:
            with_codes(student, teacher)


def _check_warmup(config: DistillConfig, steps: int) -> None:
    total = config.epochs * steps
    if config.warmup_steps >= total:
        raise SpecError(
            f"warmup_steps: wanted fewer than the {total} steps of this run "
            f"({config.epochs} epochs of {steps}), got {config.warmup_steps}; train longer, or "
            "lower distillation.warmup_steps in the config"
        )


def _reestimate(
    student: nn.Module,
    images: Tensor | Iterable[object],
    config: DistillConfig,
    say: Callable[[str], None],
) -> None:
    """Estimate BatchNorm's statistics anew, unless there are too few images to gain by it.

    Whoever asks for fewer gets what they ask for.
    """
    found = sample(images, config.bn_images)
    if config.bn_images >= _ENOUGH_IMAGES and batch_norms(student):
        enough = holding(found, _ENOUGH_IMAGES)
        if enough is None:
            say(
                f"BatchNorm's statistics stay as they are: there are fewer than {_ENOUGH_IMAGES} "
                "images to estimate them from"
            )
            return
        found = enough
    reestimate_batch_norm(student, found)


def frozen_epochs(student: nn.Module, config: DistillConfig) -> int:
    """How many of the last epochs train with frozen BatchNorm statistics.

    Where rounding loses little, the noise of each batch's own statistics is most of what is lost.
    Where it loses much, normalising by them helps as much as it harms.
    """
    share = config.freeze_bn_after
    if share is None:
        share = 0.0 if loses_little(student) else 1.0
    return config.epochs - round(share * config.epochs)


class _Distillation:
    """What a step needs: both networks, as fast as the device allows, and the loss."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        batches: Loader,
        message: Callable[[str], None],
    ) -> None:
        self.config, self.batches, self.message = config, batches, message
        self.device = next(student.parameters()).device
        self.accelerator = start(self.device)
        self.teacher = own_copy(teacher).eval().requires_grad_(False).to(self.device)
        steps = config.epochs * len(batches)
        _check_warmup(config, len(batches))
        self.schedule = warm_cosine(steps, config.warmup_steps)
        self.shape = input_shape_of(student)
        batch = next(iter(batches))
        example = images_in(batch, self.shape).to(self.device)
        classes = check_logits(student, self.teacher, example)
        if config.loss != "kl":
            labels_in(batch, len(example), classes)
        if config.loss != "ce" and self.accelerator.is_main_process:
            warn_of_probabilities(self.teacher, example)
        self.how = decide(config, self.teacher, example, steps, self.device)
        message(f"training is {self.how.reason}")
        self.student = self.how.place(student)
        self.how.place(self.teacher)
        self.norms = batch_norms(self.student)
        self.first_frozen = config.epochs - frozen_epochs(self.student, config)
        if self.norms and self.first_frozen < config.epochs:
            since = f"after epoch {self.first_frozen}" if self.first_frozen else "from the start"
            message(f"BatchNorm's statistics are frozen {since}")
        self.estimates_delta = set_delta(student, config) and config.delta == "hessian"
        if self.estimates_delta and config.epochs <= config.delta_every:
            message(
                f"δ is first estimated after epoch {config.delta_every}, and there are "
                f"{config.epochs}: they train with δ = 0, plain STE; lower distillation.delta_every"
            )
        self.networks: tuple[nn.Module, nn.Module] = (self.student, self.teacher)
        if config.feature_weight:
            self.networks = with_codes(self.student, self.teacher)

    def fit(
        self,
        saves: Saves | None,
        on_step: Callable[[Step], None] | None,
        on_epoch: Callable[[Epoch], None] | None,
        reestimate: Callable[[], None],
    ) -> list[Epoch]:
        def before_epoch(epoch: int) -> None:
            if epoch == self.first_frozen:
                with separate_batch_norm(self.student):
                    reestimate()
            self._refresh_delta(epoch)

        with synchronised_batch_norm(self.student, self.accelerator):
            student, teacher = self.networks
            supervised = self.config.loss == "ce"
            compiled = self.how.compiled(student, whole=True)
            self._student = self.accelerator.prepare_model(compiled)
            self._teacher = self.how.compiled(teacher, whole=False)
            return Fit(
                model=self.student,
                objective=self._supervised if supervised else self._objective,
                optimizer=build_optimizer(self.student, self.config),
                schedule=self.schedule,
                batches=self.batches,
                epochs=self.config.epochs,
                accelerator=self.accelerator,
                clip_grad=self.config.clip_grad,
                saves=saves,
                before_epoch=before_epoch,
                frozen=lambda epoch: self.norms if epoch >= self.first_frozen else (),
                on_step=on_step,
                on_epoch=on_epoch,
                target=LABELS if supervised else "agreement",
            ).run()

    def _images(self, batch: Any) -> Tensor:
        return self.how.images(images_in(batch, self.shape).to(self.device))

    def _objective(self, batch: Any) -> tuple[Tensor, Tensor]:
        images = self._images(batch)
        with self.how.autocast(self.device):
            with torch.no_grad():
                target, *wanted = answers(self._teacher(images))
            logits, *codes = answers(self._student(images))
        loss = self._loss(logits, target, batch)
        if self.config.feature_weight:
            loss = loss + self.config.feature_weight * feature_loss(*codes, *wanted)
        return loss, batch_agreement(logits.detach(), target)

    def _supervised(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Labels alone: a teacher's pass is a quarter of a step, and nobody would read it."""
        images = self._images(batch)
        with self.how.autocast(self.device):
            logits = self._student(images)
        return self._label_loss(logits, batch)

    def _label_loss(self, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return label_loss(logits, labels_in(batch, *logits.shape).to(logits.device))

    def _loss(self, logits: Tensor, target: Tensor, batch: Any) -> Tensor:
        if self.config.loss == "ce":
            return self._label_loss(logits, batch)[0]
        divergence = distillation_loss(logits, target, self.config.temperature)
        weighted = self.config.kl_weight * divergence
        if self.config.loss == "kl":
            return weighted
        return self._label_loss(logits, batch)[0] + weighted

    def _refresh_delta(self, epoch: int) -> None:
        if self.estimates_delta and epoch and epoch % self.config.delta_every == 0:
            found = update_deltas(
                self.student,
                self.teacher,
                itertools.islice(self.batches, _DELTA_BATCHES),
                temperature=self.config.temperature,
                feature_weight=self.config.feature_weight,
                divergence=self._loss,
                seed=self.config.seed + epoch,
            )
            low, high = min(found.values()), max(found.values())
            self.message(f"δ by Hutchinson's trace: {low:.2g} to {high:.2g}")

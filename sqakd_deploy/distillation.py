"""Self-supervised quantization-aware distillation: the training loop.

Nothing in this file takes a label unless the loss asks for one: with ``loss="kl"`` only the first
element of a batch is touched, and it must be a tensor of images.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqakd_deploy.errors import SpecError, TrainingError
from sqakd_deploy.evaluate import batch_agreement
from sqakd_deploy.hessian import update_deltas
from sqakd_deploy.integer import snap_biases
from sqakd_deploy.losses import distillation_loss
from sqakd_deploy.quantization import (
    activation_quantizers,
    calibrate,
    reestimate_batch_norm,
    scaling_quantizers,
    weight_quantizers,
)
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.tracing import first_tensor

_DELTA_BATCHES = 3  # as EWGS averages its trace (Lee et al., 2021, §4.1)


class Loader(Protocol):
    """Batches that can be gone through once an epoch."""

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Step:
    """What happened in a training step.

    Attributes:
        epoch: from 0.
        step: within the epoch, from 0.
        epochs: in the whole run.
        steps: in an epoch.
        loss: running mean over the epoch.
        agreement: with the target on the training batches, running mean in percent; the target
            is the teacher's answer, or the label while a teacher is trained.
        lr: learning rate of the model's parameters.
        images_per_second: over the epoch so far.
        target: what ``agreement`` is called.
    """

    epoch: int
    step: int
    epochs: int
    steps: int
    loss: float
    agreement: float
    lr: float
    images_per_second: float
    target: str = "agreement"


@dataclass(frozen=True)
class Epoch:
    """What an epoch ended with; a line of ``metrics.jsonl``."""

    epoch: int
    loss: float
    agreement: float
    lr: float
    seconds: float


class TensorBatches:
    """Shuffled batches of a tensor of preprocessed images ``(N, C, H, W)``.

    The last batch is dropped if it is smaller than half of the others: BatchNorm needs a batch.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self.images = images
        self.batch_size = min(batch_size, len(images))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest * 2 >= self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for indices in itertools.islice(order.split(self.batch_size), len(self)):
            yield self.images[indices]


def distill(
    student: nn.Module,
    images: Tensor | Loader,
    *,
    teacher: nn.Module,
    config: DistillConfig | None = None,
    calibration: Tensor | Iterable[object] | None = None,
    labelled: Loader | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train a student to answer like its teacher, without labels.

    Args:
        student: from :func:`~sqakd_deploy.quantization.quantize`; **changed in place**: calibrated,
            trained, BatchNorm re-estimated, biases moved onto the integer grid.
        images: preprocessed images ``(N, C, H, W)``, or batches of them, gone through once an
            epoch. Of a batch that is a tuple only the first element is used.
        teacher: the float model; used in evaluation mode, not changed.
        config: how; ``epochs=0`` only calibrates.
        calibration: images that set ranges and BatchNorm; by default the first ones of ``images``.
        labelled: batches ``(images, labels)``, needed by the baselines ``ce`` and ``kl+ce`` alone;
            they replace ``images``.
        on_step: called after each step.
        on_epoch: called after each epoch.

    Returns:
        A record for each epoch.

    Raises:
        SpecError: if a loss with labels gets none, or labels come with one that needs none.
        TrainingError: if the loss is not finite.
    """
    config = config or DistillConfig()
    if (config.loss == "kl") != (labelled is None):
        wanted = "no labels" if config.loss == "kl" else "labelled batches"
        raise SpecError(f"loss {config.loss!r} wants {wanted}; give the other or change the loss")
    batches = labelled if labelled is not None else _as_loader(images, config)
    device = next(student.parameters()).device
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False).to(device)
    still = calibration if calibration is not None else batches
    calibrate(student, _first_images(still, config.calibration_images))
    records = []
    if config.epochs:
        trainer = _Trainer(student, frozen, config, len(batches), on_step)
        for epoch in range(config.epochs):
            record = trainer.run_epoch(epoch, batches)
            records.append(record)
            if on_epoch:
                on_epoch(record)
    reestimate_batch_norm(student, _first_images(still, config.bn_images))
    snap_biases(student)
    student.eval()
    return records


def _as_loader(images: Tensor | Loader, config: DistillConfig) -> Loader:
    if isinstance(images, Tensor):
        return TensorBatches(images, config.batch_size, config.seed)
    return images


def _first_images(images: Tensor | Iterable[object], count: int) -> Iterator[Tensor]:
    """Batches until ``count`` images were seen."""
    if isinstance(images, Tensor):
        yield from images[:count].split(512)
        return
    seen = 0
    for batch in images:
        tensor = first_tensor(batch)
        yield tensor[: count - seen]
        seen += len(tensor)
        if seen >= count:
            return


def parameter_groups(student: nn.Module, config: DistillConfig) -> list[dict[str, Any]]:
    """The model's parameters with weight decay, the quantizers' at their own rate without.

    PACT's α decays, as published.
    """
    quantizers = [*weight_quantizers(student).values(), *activation_quantizers(student).values()]
    own: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for quantizer in quantizers:
        pulled = getattr(quantizer, "decayed", ())
        for name, parameter in quantizer.named_parameters():
            (decayed if name in pulled else own).append(parameter)
    known = {id(parameter) for parameter in own + decayed}
    model = [p for p in student.parameters() if id(p) not in known]
    rates = {"lr": config.quantizer_lr}
    groups = [
        {"params": model, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": own, **rates, "weight_decay": 0.0},
        {"params": decayed, **rates, "weight_decay": config.weight_decay},
    ]
    return [group for group in groups if group["params"]]


class _Trainer:
    """The state that lives from step to step."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        steps: int,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config
        self.steps = steps
        self.on_step = on_step
        self.optimizer = torch.optim.Adam(parameter_groups(student, config))
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scales_gradient = _set_delta(student, config)

    def run_epoch(self, epoch: int, batches: Loader) -> Epoch:
        set_epoch = getattr(batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        if self.scales_gradient and self.config.delta == "hessian":
            self._refresh_delta(epoch, batches)
        self.student.train()
        start, images = time.perf_counter(), 0
        loss_sum = agreement_sum = 0.0
        lr = self.base_rates[0]
        for step, batch in enumerate(batches):
            lr = self._schedule(epoch + step / self.steps)
            loss, agreement = self._step(batch)
            images += len(first_tensor(batch))
            loss_sum, agreement_sum = loss_sum + loss, agreement_sum + agreement
            if self.on_step:
                rate = images / (time.perf_counter() - start)
                means = loss_sum / (step + 1), 100 * agreement_sum / (step + 1)
                self.on_step(Step(epoch, step, self.config.epochs, self.steps, *means, lr, rate))
        count = max(1, self.steps)
        seconds = time.perf_counter() - start
        return Epoch(epoch, loss_sum / count, 100 * agreement_sum / count, lr, seconds)

    def _schedule(self, epoch: float) -> float:
        """Cosine from the base rates to 0 over the run."""
        factor = 0.5 * (1 + math.cos(math.pi * epoch / self.config.epochs))
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        return float(self.base_rates[0] * factor)

    def _step(self, batch: Any) -> tuple[float, float]:
        device = next(self.student.parameters()).device
        images = first_tensor(batch).to(device)
        with torch.no_grad():
            target = self.teacher(images)
        logits = self.student(images)
        loss = self._loss(logits, target, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value}: training stopped before this step changed a weight; "
                "lower --lr or set --clip-grad 5"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip_grad)
        self.optimizer.step()
        return value, float(batch_agreement(logits.detach(), target))

    def _loss(self, logits: Tensor, target: Tensor, batch: Any) -> Tensor:
        if self.config.loss == "kl":
            return distillation_loss(logits, target, self.config.temperature)
        labelled = F.cross_entropy(logits, batch[1].to(logits.device))
        if self.config.loss == "ce":
            return labelled
        return labelled + distillation_loss(logits, target, self.config.temperature)

    def _refresh_delta(self, epoch: int, batches: Loader) -> None:
        if epoch and epoch % self.config.delta_every == 0:
            update_deltas(
                self.student,
                self.teacher,
                itertools.islice(batches, _DELTA_BATCHES),
                temperature=self.config.temperature,
                seed=self.config.seed + epoch,
            )


def _set_delta(student: nn.Module, config: DistillConfig) -> bool:
    """Give δ to the quantizers whose method scales gradients; whether there are any."""
    start = 0.0 if config.delta == "hessian" else float(config.delta)
    quantizers = scaling_quantizers(student)
    for quantizer in quantizers.values():
        quantizer.delta.fill_(start)
    return bool(quantizers)

"""The training loop that teachers and students share: steps, schedule, saves, figures."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sqakd_deploy.data.batches import mixed_seed
from sqakd_deploy.errors import TrainingError
from sqakd_deploy.given import enough_to_normalise
from sqakd_deploy.nonfinite import check_images, first_non_finite, non_finite_gradients
from sqakd_deploy.tracing.trace import first_tensor
from sqakd_deploy.training.interrupts import held_interrupts
from sqakd_deploy.training.kernels import compiling
from sqakd_deploy.training.processes import averaged
from sqakd_deploy.training.saves import Position, Saves


class Loader(Protocol):
    """Batches to go through once an epoch.

    ``set_epoch(n)`` is called where there is one; so is ``starting_at(step)``, which yields the
    batches from a step on without making those before, when an epoch is resumed.
    """

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
            is the teacher's answer, or the label where only labels are trained on.
        lr: learning rate of the model's parameters.
        images_per_second: since the first step ended, which compiles, over all processes; of the
            first step its own.
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


def _from(batches: Loader, step: int) -> Iterator[Any]:
    if step == 0:
        return iter(batches)
    starting_at = getattr(batches, "starting_at", None)
    return starting_at(step) if starting_at else itertools.islice(batches, step, None)


def cosine(progress: float) -> float:
    """Factor of the learning rate, from 1 at progress 0 to 0 at 1 (Loshchilov & Hutter, 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warm_cosine(steps: int, warmup: int) -> Callable[[float], float]:
    """A line from 1/``warmup`` to 1, then :func:`cosine` (Goyal et al., 2017, §2.2).

    Args:
        steps: of the whole run.
        warmup: steps of the line; 0 has none.

    Returns:
        From progress (0 to 1) to the factor of the learning rate.
    """

    def factor(progress: float) -> float:
        done = progress * steps
        if done < warmup:
            return min(1.0, (done + 1) / warmup)
        return cosine((done - warmup) / (steps - warmup))

    return factor


def one_cycle(progress: float, rise: float = 0.2, start: float = 0.04) -> float:
    """Factor of the highest rate: up from ``start``, then down to 0 (Smith & Topin, 2018)."""
    if progress < rise:
        return start + (1 - start) * (1 - cosine(progress / rise))
    return cosine((progress - rise) / (1 - rise))


@dataclass
class Fit:
    """A training run.

    Attributes:
        model: as saved and examined; not wrapped or compiled.
        objective: from a batch to the loss and the share of it that hits the target (0 to 1).
        optimizer: over the model's parameters.
        schedule: from progress (0 to 1) to a factor of the learning rates.
        batches: gone through once an epoch.
        epochs: how often.
        accelerator: the processes.
        clip_grad: largest gradient norm.
        saves: where to save and to resume from; None does neither.
        before_epoch: called with the epoch's number, but not when it is resumed half-way.
        frozen: by the epoch's number, the modules that stay in evaluation mode in it.
        on_step: called after each step.
        on_epoch: called after each epoch.
        target: what hits are called in figures.
    """

    model: nn.Module
    objective: Callable[[Any], tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[float], float]
    batches: Loader
    epochs: int
    accelerator: Accelerator
    clip_grad: float | None = None
    saves: Saves | None = None
    before_epoch: Callable[[int], None] = lambda epoch: None
    frozen: Callable[[int], Iterable[nn.Module]] = lambda epoch: ()
    on_step: Callable[[Step], None] | None = None
    on_epoch: Callable[[Epoch], None] | None = None
    target: str = "agreement"

    def run(self) -> list[Epoch]:
        """Train to the end, from the newest save if there is one.

        Raises:
            DataError: if a batch of one image cannot be normalised by, or the loss is not finite
                because the batch's images are not.
            TrainingError: if the loss is not finite (names the layer), or the gradients are not;
                if compiling fails. The last save is kept.
            KeyboardInterrupt: after the step under way and a save; at once when pressed twice.
        """
        with held_interrupts() as self._interrupted:
            return self._run()

    def _run(self) -> list[Epoch]:
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._steps = len(self.batches)
        self._parameters = list(self.model.parameters())  # found once: walking the tree takes time
        self._seed = torch.initial_seed()
        self._began, self._images, self._warm = time.perf_counter(), 0, False
        position = self.saves.restore(self.model, self.optimizer) if self.saves else None
        position = position or Position()
        records = []
        while position.epoch < self.epochs:
            record = self._epoch(position)
            position = Position(epoch=position.epoch + 1)
            records.append(record)
            if self.on_epoch:
                self.on_epoch(record)
        return records

    def _epoch(self, position: Position) -> Epoch:
        set_epoch = getattr(self.batches, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(position.epoch)
        if position.step == 0:
            self.before_epoch(position.epoch)
        self.model.train()
        for module in self.frozen(position.epoch):
            module.eval()
        start = time.perf_counter()
        # That of the last step taken: a run stopped at an epoch's end has none left to take.
        lr = self._schedule(position.epoch + max(0, position.step - 1) / self._steps)
        for number, batch in enumerate(_from(self.batches, position.step), position.step):
            lr = self._schedule(position.epoch + number / self._steps)
            self._separate_masks(position.epoch * self._steps + number)
            loss, share = self._step(batch)
            position = self._advance(position, batch, loss, share, lr)
            interrupted = self._interrupted()
            if self.saves and (self.saves.due or interrupted) and self.accelerator.is_main_process:
                done = position.epoch * self._steps + position.step
                self.saves.write(done, position, self.model, self.optimizer)
            if interrupted:
                raise KeyboardInterrupt
        count = max(1, position.step)
        seconds = round(time.perf_counter() - start, 3)
        loss, share = position.loss_sum / count, 100 * position.share_sum / count
        return Epoch(position.epoch, loss, share, lr, seconds)

    def _separate_masks(self, step: int) -> None:
        """Processes draw their own dropout masks; the first goes on with the generator it saves."""
        process = self.accelerator.process_index
        if process:
            torch.manual_seed(mixed_seed(mixed_seed(self._seed, process), step))

    def _advance(
        self, before: Position, batch: Any, loss: float, share: float, lr: float
    ) -> Position:
        images = len(first_tensor(batch)) * self.accelerator.num_processes
        self._images += images
        after = Position(
            before.epoch,
            before.step + 1,
            before.loss_sum + loss,
            before.share_sum + share,
        )
        if self.on_step:
            means = after.loss_sum / after.step, 100 * after.share_sum / after.step
            now = time.perf_counter()
            speed = self._images / (now - self._began)
            if not self._warm:
                self._began, self._images, self._warm = now, 0, True
            at = (after.epoch, before.step, self.epochs, self._steps)
            self.on_step(Step(*at, *means, lr, speed, self.target))
        return after

    def _schedule(self, epochs: float) -> float:
        factor = self.schedule(epochs / self.epochs)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor

    def _step(self, batch: Any) -> tuple[float, float]:
        with compiling(), enough_to_normalise():
            return self._taken(batch)

    def _taken(self, batch: Any) -> tuple[float, float]:
        loss, share = self.objective(batch)
        figures = averaged(torch.stack([loss.detach().float(), share.float()]), self.accelerator)
        value, hits = figures.tolist()
        if not math.isfinite(value):
            self._stop(batch, value)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self._limit_gradients()
        self.optimizer.step()
        return value, hits

    def _limit_gradients(self) -> None:
        """Clip gradients, and stop before any that is not finite changes a weight.

        Where they are not clipped, a GPU's are not looked at: every step would wait for it.
        """
        if self.clip_grad is None and self.accelerator.device.type != "cpu":
            return
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if not bool(norm.isfinite()):
            raise TrainingError(
                f"the loss is finite, {non_finite_gradients(self.model)}. Training stopped before "
                "this step changed a weight; lower the learning rate"
            )
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad, norm)

    def _stop(self, batch: Any, value: float) -> None:
        images = first_tensor(batch).to(self.accelerator.device)
        check_images(images)
        where = first_non_finite(self.model, images)
        raise TrainingError(
            f"the loss is {value}: {where}. Training stopped before this step changed a weight; "
            "lower the learning rate or clip gradients (--clip-grad 5)"
        )

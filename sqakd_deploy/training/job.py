"""What every training job does: reads, builds, keeps a run folder, and trains a float model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from sqakd_deploy.checkpoint import (
    CHECKSUM,
    LAST,
    TEACHER,
    Run,
    open_run,
)
from sqakd_deploy.config import RunConfig
from sqakd_deploy.data import ImageData
from sqakd_deploy.data.batches import Batches, LabelledBatches
from sqakd_deploy.errors import SpecError, SqakdError
from sqakd_deploy.listening import Listener
from sqakd_deploy.models.outputs import count_logits
from sqakd_deploy.origin import origin_in, origin_of
from sqakd_deploy.placed import FACT, check_rules, rules_of
from sqakd_deploy.preparing import (
    build,
    check_there,
    data_facts,
    load,
    pick_device,
    understood,
)
from sqakd_deploy.runs import check_images
from sqakd_deploy.training.acceleration import fitting_threads
from sqakd_deploy.training.curves import check_installed
from sqakd_deploy.training.processes import start
from sqakd_deploy.training.saves import Saves
from sqakd_deploy.training.teacher import train_teacher
from sqakd_deploy.training.watch import Watch

T = TypeVar("T")
TEACHING = "teacher"  # what the states of a float model's training are saved under


def reopen(folder: Path | str, kind: str) -> Run:
    """A run folder to go on with.

    Args:
        folder: of the run.
        kind: "student", or "teacher" for one that trains nothing else.

    Raises:
        SpecError: if it is complete, or of the other kind.
    """
    run = open_run(folder)
    folder = run.path
    teaches = run.kind == "teacher"
    if run.status == "complete":
        use = (
            f"give its weights to a student: --weights {folder / TEACHER}"
            if teaches
            else f"export it, 'sqakd-deploy export model.onnx --run {folder}', or train a new run"
        )
        raise SpecError(f"resume: {folder} is complete; {use}")
    if run.kind != kind:
        command = "teacher" if teaches else "train"
        raise SpecError(
            f"resume: {folder} trains a {run.kind}; go on with "
            f"'sqakd-deploy {command} --resume {folder}'"
        )
    if not teaches:
        check_rules(run)
    return run


class Job:
    """One process's part in a run; alone, all of it.

    Args:
        config: of the run.
        listener: hears of the progress.
        found: a run that is gone on with. It knows what its images need, wherever its weights
            came from.
    """

    def __init__(self, config: RunConfig, listener: Listener, found: Run | None = None) -> None:
        if config.tensorboard:
            check_installed()
        known = origin_in(found) if found is not None else None
        self.origin = known or origin_of(config.model)
        self.config = config.model_copy(update={"model": self.origin.completed(config.model)})
        if found is None:  # a run that goes on needs its weights no more
            check_there(self.config.model)
        else:
            check_images(found, "put it back to go on")
        self.accelerator = start(pick_device(config.device))
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.listener = listener if self.main else Listener()
        self.seconds: dict[str, float] = {}
        self.seed = config.distillation.seed

    @contextmanager
    def prepared(
        self, batch_size: int, *, labelled: bool = False
    ) -> Iterator[tuple[nn.Module, ImageData]]:
        """The float model and the images, with the threads that suit them.

        Args:
            batch_size: images a step.
            labelled: refuse images without labels.
        """
        torch.manual_seed(self.seed)
        origin = self.origin.of_images_alone() if labelled else self.origin
        with self.accelerator.local_main_process_first():  # one of a machine's decodes for all
            data = load(self.config, self.listener, preprocessing=origin.preprocessing)
        if labelled:
            data.train.need_labels()
        model, built_for = build(self.config, data, origin)
        model.to(self.device)
        image = (data.preprocessing.channels, *data.preprocessing.input_size)
        classes = count_logits(model, self.config.model.name, image)
        supervised = labelled or self.config.distillation.loss != "kl"
        data = understood(self.config, data, origin, classes, self.listener, labelled=supervised)
        self._facts = data_facts(data, origin, classes, built_for)
        self._checksum = data.checksum
        with fitting_threads(model, torch.zeros(batch_size, *image, device=self.device)):
            yield model, data

    def opened(self, open_folder: Callable[[], Run]) -> Run:
        """The run folder, the same in every process, with what is known about the images."""
        run = self._from_main(open_folder)
        run.writable = self.main
        self._compare(run.facts.get(CHECKSUM))
        facts: dict[str, Any] = {CHECKSUM: self._checksum}
        if run.kind != "teacher":
            facts[FACT] = rules_of(self.config.quantization)
        run.update(status="running", kind=run.kind, data=self._facts, **facts)
        return run

    def _compare(self, before: int | None) -> None:
        """Say so where a run goes on with other images than it began with."""
        if before not in (None, self._checksum):
            self.listener.message(
                f"the images of {self._facts['name']} have changed since the run began: it goes on "
                "with those that are there, and ends otherwise than it would have"
            )

    @contextmanager
    def recorded(self, run: Run, before_leaving: Callable[[], None]) -> Iterator[None]:
        """Keeps in the run folder how its work ended, if not well.

        Args:
            run: the folder.
            before_leaving: saves what there is when a person stops the run.
        """
        try:
            yield
        except KeyboardInterrupt:
            before_leaving()
            run.update(status="interrupted", seconds=self.seconds)
            raise
        except SqakdError as error:
            run.update(status="failed", error=str(error), seconds=self.seconds)
            raise

    def finish(self, run: Run, results: dict[str, Any]) -> None:
        """Mark a run complete; nothing is left to resume."""
        run.update(status="complete", results=results)
        if self.main:
            Saves(run.path / LAST).clear()

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

    def train_teacher(self, model: nn.Module, data: ImageData, run: Run) -> None:
        """Train the float model, with labels."""
        config = self.config.teacher
        batches = self._labelled(data, config.batch_size)
        with self.timed("teacher"), Watch(self.listener, run, "teacher") as watch:
            self.listener.start("teacher", config.epochs * len(batches))
            train_teacher(
                model,
                batches,
                config,
                acceleration=self.config.distillation,
                saves=self._saves(run, TEACHING),
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

    def timed(self, part: str) -> _Timer:
        """Notes in :attr:`seconds` how long a part took."""
        return _Timer(self.seconds, part)


class _Timer:
    """Notes how long a block took, also when it fails."""

    def __init__(self, into: dict[str, float], part: str) -> None:
        self._into, self._part = into, part

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self._into[self._part] = round(time.perf_counter() - self._start, 2)

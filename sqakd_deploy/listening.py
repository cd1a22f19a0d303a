"""What a long job tells whoever watches it; the command line draws it, the API may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from sqakd_deploy.checkpoint import METRICS, Run
from sqakd_deploy.training.curves import Curves
from sqakd_deploy.training.fitting import Epoch, Step


class Listener:
    """Hears of a run's progress; every method does nothing unless overridden."""

    def message(self, text: str) -> None:
        """A sentence for the log."""

    def start(self, task: str, total: int) -> None:
        """A task of ``total`` units begins; one runs at a time."""

    def advance(self, done: int, step: Step | None = None) -> None:
        """``done`` units of the running task are done; ``step`` has figures where it trains."""

    def finish(self) -> None:
        """The running task ended."""


def told(listener: Listener, task: str) -> Callable[[int, int], None]:
    """A callback for work that tells (done, total): the task begins when it is first called."""
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            listener.start(task, total)
        started = True
        listener.advance(done)

    return progress


class Watch:
    """Passes a training's steps and epochs on to a listener and the run's metrics.

    Args:
        listener: hears of each step.
        run: keeps a line for each epoch.
        part: which training of the run it is, "teacher" or "student".
    """

    def __init__(self, listener: Listener, run: Run, part: str) -> None:
        self._listener, self._run, self._part = listener, run, part
        self._curves: Curves | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        self._stack.callback(self._listener.finish)
        if self._run.config.tensorboard and self._run.writable:
            self._curves = self._stack.enter_context(Curves(self._run.path, self._part))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def on_step(self, step: Step) -> None:
        """A training step, as progress of the running task."""
        self._listener.advance(step.epoch * step.steps + step.step + 1, step)
        if self._curves:
            self._curves.add(step)

    def on_epoch(self, epoch: Epoch) -> None:
        """An epoch, as a line of ``metrics.jsonl``; a full disk costs this line only."""
        try:
            self._run.append_metrics({"part": self._part, **asdict(epoch)})
        except OSError as error:
            self._listener.message(f"could not write {METRICS}: {error}; training goes on")

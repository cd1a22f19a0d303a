"""What a training leaves behind while it runs: progress, a line an epoch, and curves."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

from sqakd_deploy.checkpoint import METRICS, Run
from sqakd_deploy.listening import Listener
from sqakd_deploy.training.curves import Curves
from sqakd_deploy.training.fitting import Epoch, Step


class Watch:
    """Passes a training's steps and epochs on to a listener and the run's metrics.

    Figures never stop a training: a full disk or a damaged file costs them alone.

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
            try:
                self._curves.add(step)
            except OSError as error:
                self._curves = None
                self._listener.message(
                    f"could not write curves for TensorBoard: {error}; training goes on without"
                )

    def on_epoch(self, epoch: Epoch) -> None:
        """An epoch, as a line of ``metrics.jsonl``."""
        try:
            self._run.append_metrics({"part": self._part, **asdict(epoch)})
        except (OSError, ValueError, KeyError, TypeError) as error:  # lines of old may be damaged
            self._listener.message(f"could not write {METRICS}: {error}; training goes on")

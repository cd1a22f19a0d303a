"""Progress for people: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sqakd_deploy.listening import Listener

if TYPE_CHECKING:  # as in listening.py
    from sqakd_deploy.training.fitting import Step

_PLAIN_SECONDS = 5.0


def listener_for(console: Console) -> Listener:
    """A live bar on a terminal, plain lines elsewhere."""
    return RichListener(console) if console.is_terminal else PlainListener(console)


class RichListener(Listener):
    """A progress bar with ETA, loss and agreement."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._fresh = True

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False)

    def start(self, task: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
        )
        self._task = self._progress.add_task(task, total=total, figures="")
        self._progress.start()
        self._fresh = True

    def advance(self, done: int, step: Step | None = None) -> None:
        if self._progress is None:
            return
        # What a resumed task had done before tells no speed, nor does a first step, which compiles.
        if self._fresh and step:
            self._progress.reset(self._task, completed=done)
        self._fresh = False
        self._progress.update(self._task, completed=done, figures=_figures(step))

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None


class PlainListener(Listener):
    """A line every few seconds, and one at the end of a task."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._task, self._total, self._last, self._said = "", 0, "", ""
        self._start = self._spoken = 0.0
        self._from: tuple[float, int] | None = None

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def start(self, task: str, total: int) -> None:
        self._task, self._total, self._last = task, total, ""
        self._start = self._spoken = time.monotonic()
        self._from = None

    def advance(self, done: int, step: Step | None = None) -> None:
        now = time.monotonic()
        elapsed = now - self._start
        if self._from is None:  # as RichListener
            self._from = (now, done) if step else (self._start, 0)
        began, before = self._from
        self._last = f"{self._task} {done}/{self._total}, {elapsed:.0f} s"
        if done > before:
            eta = (now - began) / (done - before) * (self._total - done)
            self._last += f", eta {eta:.0f} s"
        self._last += f", {_figures(step)}" if step else ""
        if now - self._spoken >= _PLAIN_SECONDS:
            self._spoken, self._said = now, self._last
            self.message(self._last)

    def finish(self) -> None:
        if self._last not in ("", self._said):
            self.message(self._last)
        self._last = self._said = ""


def _figures(step: Step | None) -> str:
    if step is None:
        return ""
    return (
        f"epoch {step.epoch + 1}/{step.epochs}  loss {step.loss:.4f}  "
        f"{step.target} {step.agreement:.1f} %  "
        f"{step.images_per_second:.0f} img/s  lr {step.lr:.1e}"
    )

"""Tables and progress for people."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

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
from rich.table import Table

from sqakd_deploy.listening import Listener
from sqakd_deploy.results import TrainResult
from sqakd_deploy.scoring import Score
from sqakd_deploy.training.fitting import Step
from sqakd_deploy.verification.tables import (
    conformance_table,
    constants_lines,
    coverage_lines,
    kib,
    parity_table,
    percent,
)

__all__ = [
    "PlainListener",
    "RichListener",
    "conformance_table",
    "constants_lines",
    "coverage_lines",
    "kib",
    "listener_for",
    "listing",
    "parity_table",
    "percent",
    "score_table",
    "train_table",
]

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
        self._task, self._total, self._last = "", 0, ""
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
            self._spoken = now
            self.message(self._last)

    def finish(self) -> None:
        if self._last:
            self.message(self._last)
        self._last = ""


def _figures(step: Step | None) -> str:
    if step is None:
        return ""
    return (
        f"epoch {step.epoch + 1}/{step.epochs}  loss {step.loss:.4f}  "
        f"{step.target} {step.agreement:.1f} %  "
        f"{step.images_per_second:.0f} img/s  lr {step.lr:.1e}"
    )


def _bits(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} at {bits} bit" for bits, count in counts.items())


def score_table(scores: Sequence[Score]) -> Table:
    """How good models are on labelled images."""
    table = Table(title=f"{scores[0].images} labelled images", title_justify="left")
    for name in ("", "top-1", "top-5", "cross-entropy"):
        table.add_column(name, justify="left" if not name else "right")
    for score in scores:
        loss = f"{score.loss:.4f} nats"
        table.add_row(score.what, percent(score.top1), percent(score.top5), loss)
    return table


def train_table(result: TrainResult) -> Table:
    """What a run came to."""
    table = Table(title=f"{result.label}: {result.run}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    origin = "trained here, with labels" if result.teacher_trained else "given"
    table.add_row("teacher top-1", f"{percent(result.teacher_top1)} ({origin})")
    table.add_row("student top-1", percent(result.student_top1))
    table.add_row("student–teacher agreement", percent(result.agreement))
    table.add_row("KL from teacher", f"{result.divergence:.4f} nats")
    table.add_row("images", f"{result.images} to train on, {result.test_images} held out")
    table.add_row("weight quantizers", _bits(result.quantizers["weights"]))
    table.add_row("activation quantizers", _bits(result.quantizers["activations"]))
    sizes = f"{kib(result.information_size)} packed, {kib(result.file_size)} at a byte a weight"
    table.add_row("weights and biases", f"{sizes}, {kib(result.float_size)} in fp32")
    seconds = ", ".join(f"{part} {value:.1f} s" for part, value in result.seconds.items())
    table.add_row("time", seconds)
    return table


def listing(groups: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Names with a line about each, a table a group."""
    tables = []
    for title, rows in groups.items():
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, summary in rows.items():
            table.add_row(name, str(summary))
        tables.append(table)
    return tables

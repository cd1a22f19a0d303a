"""Tables and progress for people."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
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

from sqakd_deploy.exporting import FloatFallback
from sqakd_deploy.fitting import Step
from sqakd_deploy.listening import Listener
from sqakd_deploy.parity import ParityReport
from sqakd_deploy.results import TrainResult
from sqakd_deploy.scoring import Score

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

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False)

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

    def advance(self, done: int, step: Step | None = None) -> None:
        if self._progress is not None:
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

    def message(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def start(self, task: str, total: int) -> None:
        self._task, self._total, self._last = task, total, ""
        self._start = self._spoken = time.monotonic()

    def advance(self, done: int, step: Step | None = None) -> None:
        now = time.monotonic()
        elapsed = now - self._start
        eta = elapsed / done * (self._total - done)
        self._last = f"{self._task} {done}/{self._total}, {elapsed:.0f} s, eta {eta:.0f} s"
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


def percent(value: float | None) -> str:
    """``98.61 %``, or a dash where there is none."""
    return "—" if value is None else f"{value:.2f} %"


def kib(size: int) -> str:
    """Bytes in KiB, or MiB from 10 on."""
    return f"{size / 1024:.1f} KiB" if size < 10 * 2**20 else f"{size / 2**20:.1f} MiB"


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


def parity_table(report: ParityReport) -> Table:
    """The stages of a comparison."""
    table = Table(title=f"Parity on {report.samples} images", title_justify="left")
    for heading in ("stage", "top-1", "agreement", "largest error", "mean error"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in report.stages:
        table.add_row(
            stage.name,
            percent(stage.top1),
            percent(stage.agreement),
            f"{stage.max_error:.2f} steps",
            f"{stage.mean_error:.4f} steps",
        )
    table.caption = f"one step = {report.output_step:.4g} ({report.output_step_source})"
    table.caption_justify = "left"
    return table


def coverage_lines(report: ParityReport) -> list[str]:
    """Integer coverage and float fall-backs, a line each."""
    counts = ", ".join(
        f"{report.coverage.integer.get(op, 0)} of {total} {op}"
        for op, total in sorted(report.coverage.total.items())
    )
    lines = [f"in integers: {counts}"]
    lines += _float_lines(report.coverage.fallbacks)
    lines += [f"not folded at load, runs every time: {name}" for name in report.coverage.unfolded]
    return [*lines, *_size_lines(report)]


_FEW = 3
"""More fall-backs than this, of one kind for one reason, share a line."""


def _float_lines(fallbacks: Iterable[FloatFallback]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for fallback in fallbacks:
        groups.setdefault((fallback.op_type, fallback.reason), []).append(fallback.node)
    lines = []
    for (kind, reason), nodes in groups.items():
        if len(nodes) > _FEW:
            lines.append(f"in float: {len(nodes)} {kind} ({nodes[0]} to {nodes[-1]}): {reason}")
        else:
            lines += [f"in float: {node} ({kind}): {reason}" for node in nodes]
    return lines


def _size_lines(report: ParityReport) -> list[str]:
    """What the file takes, and how far that is from what its numbers need."""
    lines = []
    if report.narrow_layers:
        packed = f"{report.coverage.packed} of {report.narrow_layers}"
        lines.append(f"packed: weights of {packed} layers below 8 bits; the others a byte each")
    ratio = report.float_size / report.size
    over = 100 * (report.size / report.information_size - 1)
    lines.append(
        f"size: {kib(report.size)}, {over:.1f} % over {kib(report.information_size)} of weights at "
        f"their bits, scales and biases; {kib(report.float_size)} in fp32 ({ratio:.2f}×)"
    )
    return lines


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

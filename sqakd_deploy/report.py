"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from sqakd_deploy.results import TrainResult
from sqakd_deploy.scoring import Score
from sqakd_deploy.verification.tables import kib, percent
from sqakd_deploy.words import counted


def _bits(counts: Mapping[int, int]) -> str:
    return ", ".join(f"{count} at {bits} bit" for bits, count in counts.items())


def score_table(scores: Sequence[Score]) -> Table:
    """How good models are on labelled images."""
    table = Table(title=counted(scores[0].images, "labelled image"), title_justify="left")
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

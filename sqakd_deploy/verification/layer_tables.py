"""Tables and lines on single layers, for people; free of torch."""

from __future__ import annotations

from collections.abc import Collection

from rich.table import Table

from sqakd_deploy.verification.isolated import SIMULATED, IsolatedReport
from sqakd_deploy.verification.layers import (
    KINDS,
    Begin,
    Kind,
    LayersReport,
    TensorReport,
    TensorStage,
)
from sqakd_deploy.verification.tables import copies, first_of, which_images
from sqakd_deploy.words import counted

_SHOWN = 20
"""Tensors in a table; --json has all."""

_SHORT = 30
"""Names of tensors up to this length are not broken in two."""

_STAR = "*"
"""Marks what decides nothing."""

_WIDE = 100
"""Characters from which on a table has all its columns."""


_FIGURES = ("largest\nerror", "mean\nerror", "codes that\ndiffer", "SNR")


def layers_table(
    report: LayersReport,
    width: int = 100,
    undecided: Collection[str] = (),
    images: str | None = None,
) -> Table:
    """Quantised tensors that differ, worst first, each in its worst stage.

    Args:
        report: of the layers.
        width: of the paper (characters); on narrow one the SNR gives way to where differences
            begin.
        undecided: stages that decide nothing; tensors that differ in these alone come last, and
            have a star.
        images: which they were compared on, in words; None are those that differ most.
    """
    count = counted(len(report.tensors), "quantised tensor")
    title = f"{count}, on {images or which_images(report.images)}; errors in steps"
    table = Table(title=title, title_justify="left")
    shown = _differing(report, undecided)[:_SHOWN]
    short = max((len(tensor.name) for tensor in shown), default=0) <= _SHORT
    table.add_column("tensor", overflow="fold", no_wrap=short)
    for heading in _FIGURES[: _columns(width)]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("begins", overflow="fold")
    for tensor in shown:
        name, *figures, begins = _tensor_row(tensor, undecided)
        table.add_row(name, *figures[: _columns(width)], begins)
    return table


def _columns(width: int) -> int:
    """How many figures of a tensor there is room for."""
    return len(_FIGURES) - (width < _WIDE)


def _differing(report: LayersReport, undecided: Collection[str] = ()) -> list[TensorReport]:
    """Those that differ in a stage that decides first."""
    found = [t for t in report.tensors if not t.stages or t.worst[0] < 0]
    return sorted(found, key=lambda tensor: _only_undecided(tensor, undecided))


def _only_undecided(tensor: TensorReport, undecided: Collection[str]) -> bool:
    """Whether it differs in stages that decide nothing, and in no other."""
    differing = {stage.stage for stage in tensor.stages if stage.max_error}
    return bool(differing) and differing <= {*undecided}


def layers_parts(
    report: LayersReport,
    width: int,
    undecided: Collection[str] = (),
    images: str | None = None,
) -> list[Table | str]:
    """The table, if a tensor differs, and a line on those that it has not.

    Args:
        report: of the layers.
        width: of the paper (characters).
        undecided: stages that decide nothing.
        images: which they were compared on, in words; None are those that differ most.
    """
    if differing := _differing(report):
        starred = any(_in_undecided(tensor, undecided) for tensor in differing)
        note = [f"{_STAR} of what decides nothing: {', '.join(undecided)}"] if starred else []
        return [layers_table(report, width, undecided, images), *note, *_unlisted_lines(report)]
    if not report.tensors:
        return []
    count = counted(len(report.tensors), "quantised tensor")
    return [
        f"{count}, on {images or which_images(report.images)}: all the student's, code for code"
    ]


def _in_undecided(tensor: TensorReport, undecided: Collection[str]) -> bool:
    stages = [begin.stage for begin in tensor.begins]
    return _only_undecided(tensor, undecided) or not {*undecided}.isdisjoint(stages)


def _unlisted_lines(report: LayersReport) -> list[str]:
    """Which tensors the table has not."""
    differing = len(_differing(report))
    more, same = differing - _SHOWN, len(report.tensors) - differing
    left = [f"{more} more: see --json"] if more > 0 else []
    left += [f"{same} are the student's, code for code"] if same else []
    return ["; ".join(left)] if left else []


def _tensor_row(tensor: TensorReport, undecided: Collection[str]) -> tuple[str, ...]:
    def worst(stage: TensorStage) -> tuple[bool, float, float]:
        decides = stage.max_error > 0 and stage.stage not in undecided
        return decides, stage.max_error, stage.share

    stage = max(tensor.stages, key=worst, default=None)
    if stage is None:
        return tensor.name, "—", "—", "—", "—", "unseen"
    ordered = sorted(tensor.begins, key=lambda begin: begin.stage in undecided)
    begins = "; ".join(_begin(b) + _STAR * (b.stage in undecided) for b in ordered)
    before = f"{begins or 'before it'} [{stage.stage}]{_STAR * (stage.stage in undecided)}"
    return (
        tensor.name,
        f"{stage.max_error:.2f}",
        f"{stage.mean_error:.4f}",
        f"{stage.share:.2f} %",
        "—" if stage.snr is None else f"{stage.snr:.1f} dB",
        begins if any(b.stage == stage.stage for b in ordered) else before,
    )


def _begin(begin: Begin) -> str:
    return f"{_where(begin)}, {begin.kind} ({begin.stage}, {counted(begin.images, 'image')})"


def _where(begin: Begin) -> str:
    return " or in ".join(["here", *begin.or_in])


def layers_lines(report: LayersReport, undecided: Collection[str] = ()) -> list[str]:
    """Where differences begin, and what cannot be seen.

    Args:
        report: of the layers.
        undecided: stages that decide nothing, of which lines say so.
    """
    kinds = [_kind_line(report, kind, undecided, decides=True) for kind in KINDS]
    others = [_kind_line(report, kind, undecided, decides=False) for kind in KINDS]
    lines = [line for line in kinds if line]
    lines += [f"decides nothing: {line}" for line in others if line]
    if not lines:
        differ = any(tensor.worst[0] < 0 for tensor in report.tensors)
        seen = "where differences begin cannot be seen"
        lines = [seen if differ else "no quantised tensor differs from the student's"]
    lines += [f"not in the file under its name: {name}" for name in report.missing]
    lines += [f"not compared: {name}: {why}" for name, why in report.unsupported.items()]
    for stage, isolated in report.isolated.items():
        lines += _isolated_lines(stage, isolated)
    for stage, names in report.unseen.items():
        lines.append(f"unseen in {stage} (reading changes the answers): {', '.join(names)}")
    return lines


def _isolated_lines(stage: str, report: IsolatedReport) -> list[str]:
    """Every layer on the codes before it."""
    whose = "its integers'" if stage == SIMULATED else "the runtime's own"
    by = f", by up to {report.largest} steps" if report.differing else ""
    lines = [
        f"each layer on {whose} codes ({stage}): {report.differing} of {report.codes} "
        f"codes differ{by}"
    ]
    if report.worst is not None and report.differing:
        worst = report.worst
        lines[0] += (
            f"; values lie up to {worst.outside:.1e} steps beyond the border of their codes "
            f"({worst.name})"
        )
        lines[0] += "" if report.faulty else ": rounding"
    lines[0] += copies(report.moved)
    faults = report.faults(stage)
    lines += first_of(faults)
    if faults and not report.decides:
        lines.append(
            f"that decides nothing: the codes ({stage}) are of {_sources(report)}, since reading "
            "all at once changes the answers, and one may have rounded as another did not"
        )
    return lines


def _sources(report: IsolatedReport) -> str:
    """What codes are of that need not fit together."""
    if report.programs > 1:
        return f"{report.programs} programs"
    return f"the runtime and, for {', '.join(report.unread)}, of the student"


def _kind_line(
    report: LayersReport, kind: Kind, undecided: Collection[str], *, decides: bool
) -> str:
    """Where differences of a kind begin, first in topological order; empty if there are none."""
    begun = [
        (tensor, begin)
        for tensor in report.begun
        for begin in tensor.begins
        if begin.kind == kind and (begin.stage not in undecided) == decides
    ]
    if not begun:
        return ""
    count = len({tensor.name for tensor, _ in begun})
    tensor, begin = begun[0]
    base = tensor.stages[0].stage
    against = "" if begin.stage == base else f" against {base}"
    return (
        f"{kind}: differences begin in {counted(count, 'tensor')}, the first {tensor.name} "
        f"({begin.stage}{against}, {counted(begin.images, 'image')}, "
        f"up to {begin.max_error:.2f} steps)"
        + (f", or before it in {', '.join(begin.or_in)}, unseen" if begin.or_in else "")
    )

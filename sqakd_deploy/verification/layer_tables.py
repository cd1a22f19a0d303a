"""Tables and lines on single layers, for people; free of torch."""

from __future__ import annotations

from rich.table import Table

from sqakd_deploy.verification.isolated import SIMULATED, IsolatedReport
from sqakd_deploy.verification.layers import KINDS, Begin, Kind, LayersReport, TensorReport
from sqakd_deploy.verification.tables import copies, first_of, which_images

_SHOWN = 20
"""Tensors in a table; --json has all."""

_SHORT = 30
"""Names of tensors up to this length are not broken in two."""

_WIDE = 100
"""Characters from which on a table has all its columns."""


_FIGURES = ("largest\nerror", "mean\nerror", "codes that\ndiffer", "SNR")


def layers_table(report: LayersReport, width: int = 100, images: str | None = None) -> Table:
    """Quantised tensors that differ, worst first, each in its worst stage.

    Args:
        report: of the layers.
        width: of the paper (characters); on narrow one the SNR gives way to where differences
            begin.
        images: which they were compared on, in words; None are those that differ most.
    """
    count, images = len(report.tensors), images or which_images(report.images)
    title = f"{count} quantised tensors, on {images}; errors in steps"
    table = Table(title=title, title_justify="left")
    shown = _differing(report)[:_SHOWN]
    short = max((len(tensor.name) for tensor in shown), default=0) <= _SHORT
    table.add_column("tensor", overflow="fold", no_wrap=short)
    for heading in _FIGURES[: _columns(width)]:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("begins", overflow="fold")
    for tensor in shown:
        name, *figures, begins = _tensor_row(tensor)
        table.add_row(name, *figures[: _columns(width)], begins)
    return table


def _columns(width: int) -> int:
    """How many figures of a tensor there is room for."""
    return len(_FIGURES) - (width < _WIDE)


def _differing(report: LayersReport) -> list[TensorReport]:
    return [t for t in report.tensors if not t.stages or t.worst[0] < 0]


def layers_parts(report: LayersReport, width: int, images: str | None = None) -> list[Table | str]:
    """The table (:func:`layers_table`), if a tensor differs, and a line on those that it has
    not."""
    if _differing(report):
        return [layers_table(report, width, images), *_unlisted_lines(report)]
    if not report.tensors:
        return []
    where = f"on {images or which_images(report.images)}"
    return [f"{len(report.tensors)} quantised tensors, {where}: all the student's, code for code"]


def _unlisted_lines(report: LayersReport) -> list[str]:
    """Which tensors the table has not."""
    differing = len(_differing(report))
    more, same = differing - _SHOWN, len(report.tensors) - differing
    left = [f"{more} more, none of them worse: see --json"] if more > 0 else []
    left += [f"{same} are the student's, code for code"] if same else []
    return ["; ".join(left)] if left else []


def _tensor_row(tensor: TensorReport) -> tuple[str, ...]:
    stage = max(tensor.stages, key=lambda s: (s.max_error, s.share), default=None)
    begins = "; ".join(_begin(begin) for begin in tensor.begins)
    if stage is None:
        return tensor.name, "—", "—", "—", "—", "unseen"
    same = stage.max_error == 0
    return (
        tensor.name,
        f"{stage.max_error:.2f}",
        f"{stage.mean_error:.4f}",
        f"{stage.share:.2f} %",
        "—" if stage.snr is None else f"{stage.snr:.1f} dB",
        begins if stage.stage in begins or same else f"{begins or 'before it'} [{stage.stage}]",
    )


def _begin(begin: Begin) -> str:
    return f"{_where(begin)}, {begin.kind} ({begin.stage}, {begin.images} images)"


def _where(begin: Begin) -> str:
    return " or in ".join(["here", *begin.or_in])


def layers_lines(report: LayersReport) -> list[str]:
    """Where differences begin, and what cannot be seen."""
    lines = [line for line in (_kind_line(report, kind) for kind in KINDS) if line]
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


def _kind_line(report: LayersReport, kind: Kind) -> str:
    """Where differences of a kind begin, first in topological order; empty if there are none."""
    begun = [(t, b) for t in report.begun for b in t.begins if b.kind == kind]
    if not begun:
        return ""
    count = len({tensor.name for tensor, _ in begun})
    tensor, begin = begun[0]
    return (
        f"{kind}: differences begin in {count} tensors, the first {tensor.name} "
        f"({begin.stage}, {begin.images} images, up to {begin.max_error:.2f} steps)"
        + (f", or before it in {', '.join(begin.or_in)}, unseen" if begin.or_in else "")
    )

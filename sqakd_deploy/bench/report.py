"""What a benchmark says to people: a table and the lines under it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from sqakd_deploy.bench.measure import BenchReport
from sqakd_deploy.bench.process import FP32, Row
from sqakd_deploy.words import counted

_BUSY = 0.5  # processes for each core, before it began


def bench_tables(report: BenchReport, label: str | None = None) -> list[Table]:
    """Speed, a row for each file, runtime and count of threads; then what else a file costs.

    Args:
        report: the figures.
        label: what the file's bits are called; None takes the report's.
    """
    return [_speed(report, label), _costs(report, label)]


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading, overflow="fold", no_wrap=heading == "runtime")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _speed(report: BenchReport, label: str | None) -> Table:
    left, right = ("runtime", "file"), ("threads", "median", "p95", "images/s", "× fp32")
    table = _table(f"{report.path}, batch {report.shape[0]}", left, right)
    for row in report.rows:
        baseline = report.baseline(row)
        table.add_row(
            row.runtime,
            row_name(report, row, label),
            str(row.threads),
            milliseconds(row.median),
            milliseconds(row.p95),
            f"{row.throughput:.0f}" if row.throughput >= 100 else f"{row.throughput:.1f}",
            "—" if baseline is None else f"{row.faster_than(baseline):.2f}",
        )
    return table


def _costs(report: BenchReport, label: str | None) -> Table:
    """With the first count of threads: it hardly matters here."""
    left, right = ("runtime", "file"), ("load", "memory", "process", "size", "in\nintegers")
    table = _table("", left, right)
    for row in report.rows:
        if row.threads != report.rows[0].threads:
            continue
        table.add_row(
            row.runtime,
            row_name(report, row, label),
            milliseconds(row.load),
            "—" if row.added is None else _size(row.added),
            "—" if row.peak is None else _size(row.peak),
            _size(row.size),
            f"{sum(row.coverage.integer.values())} of {sum(row.coverage.total.values())}",
        )
    return table


def row_name(report: BenchReport, row: Row, label: str | None = None) -> str:
    """``fp32``, or what the model's bits are called where it says them."""
    if row.kind == FP32 or (label is None and report.bits is None):
        return row.kind
    return label or "w{}a{}".format(*report.bits or ())


def _size(size: int) -> str:
    """Bytes in two or three digits, with which the table fits 80 columns."""
    kibs = size / 1024
    value, unit = (kibs, "KiB") if kibs < 1000 else (kibs / 1024, "MiB")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def milliseconds(seconds: float) -> str:
    """``6.12 ms``, three digits at least."""
    value = seconds * 1e3
    return (
        f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"
    )


def bench_lines(report: BenchReport, *notes: str) -> Iterator[str]:
    """What the figures mean and what they do not, a line each.

    Args:
        report: the figures.
        *notes: lines to say as they are.
    """
    yield from _coverage(report)
    yield from (f"left out: {name}: {reason}" for name, reason in report.skipped.items())
    yield from notes
    yield (
        "load: opening the file in a fresh process, from a warm disk cache; memory: what opening "
        "and running it added to that process, at most"
    )
    cpu = report.cpu
    yield f"on {cpu.name}, {cpu.cores} cores, {_instructions(report)}"
    if report.bits is not None and min(report.bits) < 8:
        yield (
            "below 8 bits the file shrinks (where weights are packed); the arithmetic stays int8 "
            "on CPUs, no faster than at 8 bits"
        )
    busy = report.load_average
    if busy is not None and busy > _BUSY * cpu.cores:
        yield (
            f"warning: the machine was busy (load average {busy:.1f}); with two "
            "and more threads the figures then say little"
        )


def _coverage(report: BenchReport) -> Iterator[str]:
    told = set()
    for row in report.rows:
        if row.kind == FP32 or row.runtime in told:
            continue
        told.add(row.runtime)
        counts = ", ".join(
            f"{row.coverage.integer.get(kind, 0)} of {total} {kind}"
            for kind, total in sorted(row.coverage.total.items())
        )
        yield f"in integers in {row.runtime}: {counts or 'none'}"
        reasons = [fallback.reason for fallback in row.coverage.fallbacks]
        if reasons:
            yield f"in float in {row.runtime}: {_first_of(reasons)}"


def _first_of(reasons: list[str]) -> str:
    first = f"the first: {reasons[0]}" if len(reasons) > 1 else reasons[0]
    return f"{counted(len(reasons), 'layer')}, {first}"


def _instructions(report: BenchReport) -> str:
    found = report.cpu.integer
    if found is None:
        return "its instructions for int8 are not known"
    if not found:
        return "without instructions for int8 (no VNNI, no AMX): int8 gains less here"
    missing = [] if "AMX-INT8" in found else ["no AMX"]
    return "int8 instructions: " + ", ".join([*found, *missing])

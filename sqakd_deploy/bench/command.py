"""What ``sqakd-deploy bench`` does once its options are parsed; torch only for a run's teacher."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sqakd_deploy.bench.inputs import input_of, metadata_of
from sqakd_deploy.bench.measure import BenchOptions, BenchReport, bench
from sqakd_deploy.bench.plot import check_picture, draw
from sqakd_deploy.bench.report import bench_lines, bench_tables
from sqakd_deploy.consoles import console, print_json
from sqakd_deploy.errors import CheckpointError, ExportError, ModelError
from sqakd_deploy.listening import told
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.progress import listener_for


def run(
    model: Path,
    *,
    fp32: Path | None,
    run: Path | None,
    runtime: tuple[str, ...],
    threads: tuple[int, ...],
    batch: int,
    rounds: int,
    seconds: float,
    warmup: int,
    input_size: tuple[int, int] | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure, and print the table."""
    facts = input_of(model)
    profile, label = (None, None) if facts is None else (facts.profile, facts.label)
    for name in runtime:
        get_runtime(name)
    if plot is not None:
        check_picture(plot)
    options = BenchOptions(threads, batch, rounds, seconds, warmup, input_size)
    listener = listener_for(console(stderr=True))
    with tempfile.TemporaryDirectory() as folder:
        baseline, note = (fp32, f"fp32: {fp32}") if fp32 else _baseline(model, run, Path(folder))
        listener.message(note)
        try:
            report = bench(
                model,
                fp32=baseline,
                runtime=runtime,
                options=options,
                progress=told(listener, "bench"),
            )
        finally:
            listener.finish()
    if plot is not None:
        draw(report, plot, label=label, note=profile)
    if as_json:
        own = {"fp32": None if fp32 is None else str(fp32)}  # what a run's teacher became is gone
        print_json(report.to_dict() | own | {"baseline": note, "profile": profile, "label": label})
    else:
        _print(report, label, [profile, note] if profile else [note], plot)


def _baseline(model: Path, run: Path | None, folder: Path) -> tuple[Path | None, str]:
    """The float model from a run, and a line about it.

    A run that was named has to work; where the file's own is not found, that is said instead.
    """
    # Imported late: this needs torch, which a device that files are measured on may not have.
    try:
        from sqakd_deploy.bench.baseline import export_teacher
        from sqakd_deploy.checkpoint import open_run, own_run
    except ModuleNotFoundError as error:
        if run is not None:
            raise
        return None, f"no fp32 beside it: there is no {error.name} here; name one with --fp32"

    path = folder / "fp32.onnx"
    if run is not None:
        opened = open_run(run)
        export_teacher(opened, path)
        return path, f"fp32: the teacher of {opened.path}"
    try:
        opened = own_run(metadata_of(model), model)
        export_teacher(opened, path)
    except (CheckpointError, ModelError, ExportError) as error:
        return None, f"no fp32 beside it: {error}"
    return path, f"fp32: the teacher of {opened.path}"


def _print(report: BenchReport, label: str | None, notes: list[str], plot: Path | None) -> None:
    out = console()
    for table in bench_tables(report, label):
        out.print(table)
    for line in bench_lines(report, *notes):
        out.print(line, highlight=False, soft_wrap=True)
    if plot is not None:
        out.print(f"drew {plot}", highlight=False, soft_wrap=True)

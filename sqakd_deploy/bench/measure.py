"""Latency, memory, load time and size of a file in each installed runtime, beside its fp32 model.

Each file in each runtime has a process of its own, which loads it fresh; the processes take turns,
one at a time, many times over. Whatever else happens on the machine then meets all of them alike,
and no runtime's threads or memory count as another's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqakd_deploy.bench.inputs import InputShape, input_of
from sqakd_deploy.bench.process import FP32, MODEL, Candidate, Process, Row
from sqakd_deploy.cpu import Cpu, describe_cpu
from sqakd_deploy.errors import ExportError, ModelError, SpecError
from sqakd_deploy.plugins import get_runtime, runtimes_for


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        threads: counts of threads to measure with, one after the other.
        batch: images in each run.
        rounds: turns of each candidate.
        seconds: length of a turn.
        warmup: runs at the start of a turn that are not timed.
        input_size: height and width (pixels), where the file leaves them open.
    """

    threads: tuple[int, ...] = (1,)
    batch: int = 1
    rounds: int = 10
    seconds: float = 0.25
    warmup: int = 2
    input_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        counts = {"threads": min(self.threads, default=0), "batch": self.batch}
        size = {"input_size": min(self.input_size or (1,))}
        for name, value in (counts | {"rounds": self.rounds} | size).items():
            if value < 1:
                raise SpecError(f"{name}: wanted at least 1, got {value}")
        if self.seconds <= 0 or self.warmup < 0:
            raise SpecError("wanted seconds above 0 and warmup of at least 0")


@dataclass(frozen=True)
class BenchReport:
    """What a comparison measured.

    Attributes:
        path: the file.
        fp32: the float file that it was compared with, if any.
        shape: of the images in a run ``(N, C, H, W)``.
        rows: by threads and runtime, the model before its float one.
        skipped: runtimes that could not open or run the file, each with its reason.
        cpu: of this machine.
        load_average: of the machine before files were opened (processes), None if it is not known.
        bits: of weights and activations, where the file says so.
    """

    path: Path
    fp32: Path | None
    shape: tuple[int, ...]
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]
    cpu: Cpu
    load_average: float | None
    bits: tuple[int, int] | None

    def baseline(self, row: Row) -> Row | None:
        """The float model's row for the same runtime and threads."""
        wanted = (FP32, row.runtime, row.threads)
        return next((r for r in self.rows if (r.kind, r.runtime, r.threads) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        rows = []
        for row in self.rows:
            baseline = self.baseline(row)
            speedup = None if baseline is None else row.faster_than(baseline)
            rows.append(row.to_dict() | {"speedup": speedup})
        facts = {"path": str(self.path), "fp32": None if self.fp32 is None else str(self.fp32)}
        return asdict(self) | facts | {"rows": rows}


def bench(
    model: Path | str,
    *,
    fp32: Path | str | None = None,
    runtime: Sequence[str] = (),
    options: BenchOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchReport:
    """Measure a file in each runtime, and its float model beside it.

    Args:
        model: an exported file.
        fp32: the float model as a file of the same kind; None measures without.
        runtime: names of runtimes; empty takes all that are installed and open the file.
        options: how to measure.
        progress: called with the turns done and their total.

    Raises:
        SpecError: if a runtime is unknown or a number is out of range.
        ModelError: if a file has several inputs, or the float model another one; if the file takes
            no such batch or size of images, or leaves the size open and the options do, too.
        ExportError: if a file is missing or no ONNX file, if a runtime that was named refuses it,
            or none opens it.
    """
    how = options or BenchOptions()
    files = {MODEL: Path(model)} | ({} if fp32 is None else {FP32: Path(fp32)})
    if fp32 is not None and not Path(fp32).exists():  # which export does not write
        raise ExportError(
            f"fp32: there is no file {fp32}; name the float model as ONNX, or leave it out: the "
            "command line takes the run's teacher"
        )
    known = {kind: input_of(path) for kind, path in files.items()}
    _check_alike(files, known)
    pixels = {kind: given is not None and given.pixels for kind, given in known.items()}
    names = [get_runtime(name).name for name in dict.fromkeys(runtime)] or sorted(
        runtimes_for(files[MODEL])
    )
    candidates = [
        Candidate(kind, path, name, threads, pixels[kind])
        for threads in dict.fromkeys(how.threads)
        for name in names
        for kind, path in files.items()
    ]
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with ExitStack() as stack:
        workers, skipped = _start(candidates, stack, strict=bool(runtime))
        stated = [(files[kind], given.shape) for kind, given in known.items() if given is not None]
        told = [(c.path, tuple(w.shape)) for c, w in workers.items() if w.shape is not None]
        shape = _shape(stated or told, files[MODEL], how)
        lost: dict[Candidate, str] | None = None if runtime else {}
        take_turns(list(workers.values()), shape, how, progress, lost)
        rows = _rows(workers, how.batch, lost)
    skipped |= {_left_out(candidate): reason for candidate, reason in (lost or {}).items()}
    if not rows:
        raise ExportError(f"no runtime runs the file: {'; '.join(skipped.values())}")
    facts = known[MODEL]
    return BenchReport(
        path=files[MODEL],
        fp32=files.get(FP32),
        shape=shape,
        rows=rows,
        skipped=skipped,
        cpu=describe_cpu(),
        load_average=load_average,
        bits=None if facts is None else facts.bits,
    )


def _check_alike(files: Mapping[str, Path], known: Mapping[str, InputShape | None]) -> None:
    """Refuse a float model of another input; what either leaves open fits."""
    model, fp32 = known[MODEL], known.get(FP32)
    if model is not None and fp32 is not None and not fp32.fits(model):
        raise ModelError(
            f"{files[FP32]}: wanted images {list(model.shape[1:])} as {files[MODEL]} has, got "
            f"{list(fp32.shape[1:])}"
        )


def _start(
    candidates: Sequence[Candidate], stack: ExitStack, *, strict: bool
) -> tuple[dict[Candidate, Process], dict[str, str]]:
    """Open every file; unless strict, a runtime that refuses the model is left out, with its
    reason, and one that refuses the float model has no baseline."""
    started: dict[Candidate, Process] = {}
    skipped: dict[str, str] = {}
    for candidate in candidates:
        if candidate.runtime in skipped:
            continue
        try:
            started[candidate] = stack.enter_context(Process(candidate))
        except ExportError as error:
            if strict:
                raise
            skipped[_left_out(candidate)] = str(error)
    kept = {c: process for c, process in started.items() if c.runtime not in skipped}
    if not kept:
        raise ExportError(f"no runtime opens the file: {'; '.join(skipped.values())}")
    return kept, skipped


def _left_out(candidate: Candidate) -> str:
    """What takes no part, as reports call it."""
    return candidate.runtime + (", fp32" if candidate.kind == FP32 else "")


def _rows(
    workers: Mapping[Candidate, Process], batch: int, lost: dict[Candidate, str] | None
) -> tuple[Row, ...]:
    """What was measured, but for runtimes in which the model failed.

    Args:
        workers: that took their turns.
        batch: images in each run.
        lost: those that failed; those that fail now are added. None lets them raise.
    """
    rows = {}
    for candidate, worker in workers.items():
        if lost is not None and candidate in lost:
            continue
        try:
            rows[candidate] = worker.row(batch)
        except ExportError as error:
            if lost is None:
                raise
            lost[candidate] = str(error)
    failed = {candidate.runtime for candidate in lost or () if candidate.kind == MODEL}
    return tuple(row for candidate, row in rows.items() if candidate.runtime not in failed)


def _shape(
    told: Sequence[tuple[Path, tuple[int | None, ...]]], path: Path, how: BenchOptions
) -> tuple[int, ...]:
    """The shape of a run's images: as the model says, or else its float model or the options.

    Of a batch that is fixed no other is measured, of the float model neither: image by image it
    would seem slower than it is.
    """
    if not told:
        raise ModelError(f"{path}: no runtime says what shape its input has")
    for file, (batch, *_) in told:
        if batch not in (None, how.batch):
            raise ModelError(
                f"{file}: wanted a batch of {how.batch}, but the file's is fixed at {batch}: "
                f"measure with --batch {batch}"
            )
    shapes, size = [shape for _, shape in told], how.input_size
    axes = zip(*(shape[1:] for shape in shapes), strict=True)
    found = [next((extent for extent in axis if extent is not None), None) for axis in axes]
    if size is not None:
        if len(found) != 3 or any(e not in (None, s) for e, s in zip(found[1:], size, strict=True)):
            raise ModelError(f"{path}: wanted images of {list(size)} pixels, the file's: {found}")
        found[1:] = size
    extents = [extent for extent in found if extent is not None]
    if len(extents) < len(found):
        raise ModelError(
            f"{path}: the file leaves the size of its images open, {list(shapes[0])}: say height "
            "and width, as --input-size 224 224"
        )
    return (how.batch, *extents)


def take_turns(
    workers: Sequence[Process],
    shape: tuple[int, ...],
    how: BenchOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
    lost: dict[Candidate, str] | None = None,
) -> None:
    """Round after round; who begins moves on, so that no place in the round is always one's.

    Args:
        workers: each keeps its own times.
        shape: of a run's images ``(N, C, H, W)``.
        how: rounds, seconds and warm-up.
        progress: called with the turns done and their total.
        lost: takes those that fail, with the reason; they have no more turns. None lets them raise.

    Raises:
        ExportError: if a runtime cannot run its file.
    """
    total = how.rounds * len(workers)
    for turn in range(total):
        round_, place = divmod(turn, len(workers))
        worker = workers[(round_ + place) % len(workers)]
        if lost is None or worker.candidate not in lost:
            try:
                worker.take_turn(shape, how.warmup, how.seconds)
            except ExportError as error:
                if lost is None:
                    raise
                lost[worker.candidate] = str(error)
        progress(turn + 1, total)

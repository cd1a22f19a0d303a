"""A file in a runtime in a process of its own, from the side of who asks it to run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import Coverage, FloatFallback
from sqakd_deploy.files import size_on_disk

MODEL, FP32 = "model", "fp32"

STARTS = 3
"""Fresh processes that load each file; the last of them is the one that runs."""


@dataclass(frozen=True)
class Candidate:
    """What takes turns: a file in a runtime, with so many threads; whether it takes raw pixels."""

    kind: str
    path: Path
    runtime: str
    threads: int
    pixels: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured of a candidate.

    Attributes:
        kind: ``model`` or ``fp32``.
        runtime: its name.
        threads: that it may use.
        batch: images in each run.
        turns: seconds of each timed run, a tuple a turn.
        load: median over fresh processes of the seconds to open the file, from a warm disk cache.
        peak: most resident memory of the process (bytes), None if it is not known.
        added: what of it came with the file (bytes), the runtime's libraries apart.
        size: of the file and what belongs to it (bytes).
        coverage: which layers run in integers.
    """

    kind: str
    runtime: str
    threads: int
    batch: int
    turns: tuple[tuple[float, ...], ...] = field(repr=False)
    load: float
    peak: int | None
    added: int | None
    size: int
    coverage: Coverage

    @property
    def median(self) -> float:
        """Median latency of a run (seconds)."""
        return statistics.median(self._times)

    @property
    def p95(self) -> float:
        """The smallest latency of a run that at least 95 % of the runs stay within (seconds)."""
        times = sorted(self._times)
        return times[(95 * len(times) - 1) // 100]  # in whole numbers, which do not round

    @property
    def throughput(self) -> float:
        """Images a second, over all timed runs."""
        return self.batch * len(self._times) / sum(self._times)

    @property
    def _times(self) -> list[float]:
        return [time for turn in self.turns for time in turn]

    def faster_than(self, other: Row) -> float:
        """How many times: the median over rounds, whose turns lie next to each other in time."""
        pairs = zip(self.turns, other.turns, strict=True)
        return statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        figures = {"median": self.median, "p95": self.p95, "throughput": self.throughput}
        return asdict(self) | figures | {"runs": len(self._times)}


class Process:
    """A candidate in a process of its own, that has loaded its file.

    Args:
        candidate: what to load.

    Raises:
        ExportError: if the runtime refuses the file, or the process ends.

    Attributes:
        shape: of the file's input, if the runtime tells it.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._turns: list[tuple[float, ...]] = []
        loads = []
        for start in range(STARTS):
            self._process = _spawn()
            try:
                opened = self._ask(
                    do="open",
                    path=str(candidate.path),
                    runtime=candidate.runtime,
                    threads=candidate.threads,
                )
            except ExportError:
                self._end()
                raise
            loads.append(opened["load"])
            if start < STARTS - 1:
                self._end()
        self._load = statistics.median(loads)
        self._resident: int | None = opened["resident"]
        self.shape: list[int | None] | None = opened["shape"]

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def take_turn(self, shape: tuple[int, ...], warmup: int, seconds: float) -> None:
        """Run images for a while, and keep the times."""
        pixels = self.candidate.pixels
        answer = self._ask(do="turn", shape=shape, warmup=warmup, seconds=seconds, pixels=pixels)
        self._turns.append(tuple(answer["times"]))

    def row(self, batch: int) -> Row:
        """What was measured."""
        facts = self._ask(do="finish")
        peak, resident = facts["peak"], self._resident
        covered = facts["coverage"]
        fallbacks = tuple(FloatFallback(**fallback) for fallback in covered.pop("fallbacks"))
        return Row(
            kind=self.candidate.kind,
            runtime=self.candidate.runtime,
            threads=self.candidate.threads,
            batch=batch,
            turns=tuple(self._turns),
            load=self._load,
            peak=peak,
            added=None if peak is None or resident is None else peak - resident,
            size=size_on_disk(self.candidate.path),
            coverage=Coverage(**covered, fallbacks=fallbacks),
        )

    def _ask(self, **request: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:  # they are pipes: see _spawn
            raise ExportError("the process that measures has no pipes")
        where = f"{self.candidate.path} in {self.candidate.runtime}"
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ExportError(
                f"{where}: the process that measures ended with code {self._process.wait()}; "
                "what it printed is above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ExportError(answer["error"])
        return answer

    def _end(self) -> None:
        self._process.communicate()  # closes its stdin, at which it ends


def _spawn() -> subprocess.Popen[str]:
    # A file in this folder that is named like a module must not stand in for the module.
    begin = (
        "import sys; sys.path[:] = filter(None, sys.path); "
        "from sqakd_deploy.bench.worker import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", begin],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )

"""One file in one runtime in a process of its own; :mod:`sqakd_deploy.bench.measure` gives turns.

It is free of torch, so that its memory is the runtime's. Requests come as a line of JSON each on
stdin, answers go the same way to stdout; the process ends with its stdin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import SqakdError
from sqakd_deploy.exporting import Session, ShapedSession
from sqakd_deploy.plugins import RUNTIMES, runtimes

LEAST_RUNS = 3  # of a turn, however long one takes


def main() -> None:
    """Serve requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is interrupted, and ends stdin
    answers = _own_stdout()
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = json.dumps(getattr(worker, request.pop("do"))(**request))
        except SqakdError as error:
            answer = json.dumps({"error": " ".join(str(error).split())})
        except Exception as error:  # a stranger's runtime; whoever asks decides what that ends
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            answer = json.dumps({"error": f"the runtime failed with {told}"})
        answers.write(answer + "\n")
        answers.flush()


def _own_stdout() -> TextIO:
    """The stream for answers; whatever a runtime prints goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


class Worker:
    """Answers requests; each public method is one."""

    session: Session

    def __init__(self) -> None:
        self.images: NDArray[Any] = np.zeros(0, np.float32)

    def open(self, path: str, runtime: str, threads: int) -> dict[str, Any]:
        """Load a file.

        Returns:
            ``load`` (seconds), ``shape`` of the input if the session knows it, ``resident``:
            memory before (bytes).
        """
        # Only this plugin: another runtime's libraries would count as this one's memory.
        mine = [entry for entry in entry_points(group=RUNTIMES) if entry.name == runtime]
        plugin = runtimes(mine)[runtime]
        before = memory("VmRSS")
        start = time.perf_counter()
        self.session = plugin.open(Path(path), threads=threads)
        load = time.perf_counter() - start
        session = self.session
        shape = list(session.input_shape) if isinstance(session, ShapedSession) else None
        return {"load": load, "shape": shape, "resident": before}

    def turn(
        self, shape: list[int], warmup: int, seconds: float, pixels: bool = False
    ) -> dict[str, Any]:
        """Run random images for a while.

        Args:
            shape: ``(N, C, H, W)``.
            pixels: raw uint8 ones, which the session lays out as its file wants.
            warmup: runs that are not timed.
            seconds: how long; there are at least :data:`LEAST_RUNS` runs.

        Returns:
            ``times`` of each run (seconds).
        """
        if self.images.shape != tuple(shape):
            generator = np.random.default_rng(0)
            self.images = (
                generator.integers(0, 256, shape, dtype=np.uint8)
                if pixels
                else generator.standard_normal(shape, dtype=np.float32)
            )
        for _ in range(warmup):
            self.session.run(self.images)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < LEAST_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            self.session.run(self.images)
            times.append(time.perf_counter() - start)
        return {"times": times}

    def finish(self) -> dict[str, Any]:
        """``peak`` memory (bytes) and, measured after it, ``coverage``."""
        peak = memory("VmHWM")
        return {"peak": peak, "coverage": asdict(self.session.coverage())}


def memory(kind: str) -> int | None:
    """This process's resident memory (bytes), now (``VmRSS``) or at most (``VmHWM``).

    Not by ``getrusage``, whose maximum a child takes over from its parent. None but on Linux.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()

"""The same images through every way of running a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import ExportError, ParityError
from sqakd_deploy.exporting import Coverage, Runtime, Session, named_stages
from sqakd_deploy.verification.measures import Logits, answers
from sqakd_deploy.verification.sizes import Sizes


@dataclass(frozen=True)
class Expected:
    """What a file is compared with.

    Attributes:
        name: who gave the answers, as a stage is called.
        logits: the answers ``(N, K)``.
        labels: of the images ``(N,)``, where known.
        step: that logit errors are counted in (logits), and where it comes from.
        sizes: of the student, where it is known.
    """

    name: str
    logits: Logits
    labels: NDArray[np.int64] | None
    step: tuple[float, str]
    sizes: Sizes | None = None

    def differs(self, output: Logits) -> NDArray[np.bool_]:
        """Which images ``(N,)`` logits ``(N, K)`` give another answer to."""
        found: NDArray[np.bool_] = self.answers(output) != self.logits.argmax(axis=1)
        return found

    def answers(self, output: Logits) -> NDArray[np.int64]:
        """Top-1 answers ``(N,)`` of logits ``(N, K)``, ties of the student's own counted as its."""
        return answers(output, self.logits, self.step[0])


@dataclass(frozen=True)
class Runs:
    """What every way of running a file answered.

    Attributes:
        outputs: logits ``(N, K)`` by stage.
        coverage: which layers the optimised session runs in integers.
        skipped: why a runtime took no part, by its name.
        undecided: stages that are shown and count for nothing.
        sessions: of the runtime that proves the file, by stage; opening one takes long.
    """

    outputs: Mapping[str, Logits]
    coverage: Coverage
    skipped: Mapping[str, str]
    undecided: frozenset[str] = frozenset()
    sessions: Mapping[str, Session] = field(default_factory=dict, repr=False)

    def worst_images(self, expected: Expected, count: int) -> NDArray[np.int64]:
        """Indices of the images that a stage which decides answers otherwise, then of those whose
        logits are farthest off in any, worst first."""
        errors = [np.abs(o.astype(np.float64) - expected.logits) for o in self.outputs.values()]
        largest = np.max([error.max(axis=1) for error in errors], axis=0)
        deciding = self.outputs.keys() - self.undecided
        kept = ~np.any([expected.differs(self.outputs[name]) for name in deciding], axis=0)
        return np.lexsort((-np.nan_to_num(largest, nan=np.inf), kept))[:count]


def run_stages(
    path: Path,
    batches: Sequence[NDArray[np.float32]],
    expected: Expected,
    runtime: Runtime,
    others: Mapping[str, Runtime] | None = None,
    *,
    others_decide: bool = True,
) -> Runs:
    """Run a file in every way there is.

    Args:
        path: the file.
        batches: preprocessed images ``(N, C, H, W)``.
        expected: the answers to all of them.
        runtime: that proves the file: it must open it, and runs it in each of its stages.
        others: runtimes that take part if they can open the file.
        others_decide: whether their answers count for the proof.

    Raises:
        ExportError: if the runtime cannot open or run the file.
        ParityError: if the answers have another shape.
    """
    sessions = {n: runtime.open(path, optimize=o) for n, o in named_stages(runtime).items()}
    outputs = {name: _logits(session, batches) for name, session in sessions.items()}
    *_, last = sessions.values()
    skipped: dict[str, str] = {}
    for name, output in outputs.items():
        _check_shape(name, output, expected)
    for name, other in (others or {}).items():
        try:
            output = _logits(other.open(path), batches)
            _check_shape(name, output, expected)
        except Exception as error:  # a stranger's plugin must not keep the others from reporting
            reason = " ".join(str(error).split()) or type(error).__name__
            if others_decide:
                raise ExportError(f"{name} cannot run the file: {reason}") from error
            skipped[name] = reason
        else:
            outputs[name] = output
    undecided = frozenset() if others_decide else frozenset(others or {}) - frozenset(skipped)
    return Runs(outputs, _coverage(runtime, last), skipped, undecided, sessions)


def _check_shape(name: str, output: Logits, expected: Expected) -> None:
    if output.shape != expected.logits.shape:
        raise ParityError(
            f"{name}: wanted logits {expected.logits.shape}, as the {expected.name} gave "
            f"them, got {output.shape}: the file is another model's"
        )


def _coverage(runtime: Runtime, session: Session) -> Coverage:
    """What a session says that it runs in integers, before a report is made of it."""
    covered = session.coverage()
    if not isinstance(covered, Coverage):
        raise ExportError(
            f"{runtime.name}: wanted a Coverage of its session, got {type(covered).__name__}"
        )
    return covered


def _logits(session: Session, batches: Sequence[NDArray[np.float32]]) -> Logits:
    return np.concatenate([session.run(batch) for batch in batches])

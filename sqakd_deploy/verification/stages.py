"""What every way of running a file answered, compared with saved or given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.consoles import as_text
from sqakd_deploy.errors import ParityError
from sqakd_deploy.exporting import Conformance, Coverage
from sqakd_deploy.files import size_on_disk
from sqakd_deploy.graph import IntegerGraph
from sqakd_deploy.verification.constants import Difference
from sqakd_deploy.verification.isolated import IsolatedReport
from sqakd_deploy.verification.measures import Logits, range_step, tied
from sqakd_deploy.verification.running import Expected, Runs
from sqakd_deploy.verification.saturation import SaturationReport


@dataclass(frozen=True)
class Tolerance:
    """How far an exported file may be from its student.

    Attributes:
        agreement: least top-1 agreement (percent).
        accuracy: most that top-1 accuracy may differ, where labels are known (points).
        mean_error: most that logits may be off in the mean (steps of the output scale). A wrong
            last scale moves all logits alike and no answer; the rounding of float32 alone moved
            them by up to 2 steps in deep untrained networks (``docs/families.md``).
    """

    agreement: float = 99.5
    accuracy: float = 0.3
    mean_error: float = 4.0


@dataclass(frozen=True)
class Stage:
    """One way of running the student, compared with the one in PyTorch.

    Attributes:
        name: which.
        top1: accuracy (percent), None without labels. An answer that ties with the student's
            counts as the student's, here and in the agreement
            (:func:`~sqakd_deploy.verification.measures.answers`).
        agreement: with PyTorch, on the top-1 answer (percent).
        max_error: largest logit error (steps of the output scale).
        mean_error: mean logit error (steps).
        max_absolute: largest logit error (logits).
        decides: whether it counts for the proof.
        differing: images that are answered otherwise.
        explained: whether that is but one, and every layer is right on the codes that the runtime
            computed for it: a value lies on the border of two codes, where sums in another order
            put it on the other side. It is not counted where one image alone is more than is
            allowed, unless nothing is.
        only_rounding: whether what differs is all rounding: every layer is right on the codes that
            the runtime computed, and the file as it is deployed, optimised, gives the student's
            logits bit for bit. Sums of float32 then stand for the integers' here, and how far a
            network carries their rounding is not the file's fault.
    """

    name: str
    top1: float | None
    agreement: float
    max_error: float
    mean_error: float
    max_absolute: float
    decides: bool = True
    differing: int = 0
    explained: bool = False
    only_rounding: bool = False


@dataclass(frozen=True)
class ParityReport:
    """What a comparison found.

    Attributes:
        samples: images compared.
        output_step: the output scale that errors are counted in (logits).
        output_step_source: where that scale comes from.
        stages: PyTorch first, then each way of running the file.
        coverage: which layers the optimised session runs in integers.
        size: of the file (bytes).
        float_size: of the same weights in float32 (bytes); None where they are not known.
        information_size: of weights at their own bits, scales and biases (bytes); what the file
            has beyond is its graph. None where they are not known.
        narrow_layers: count of layers with weights below 8 bits; ``coverage.packed`` of them are
            stored so. None where they are not known.
        byte_layers: count of layers with weights of 8 bits; None as above.
        float_layers: count of layers with float weights; None as above.
        tolerance: what was allowed.
        skipped: why a runtime took no part, by its name.
        conformance: the documented rules of a target whose runtime files are not run in.
        constants: those of the file that are not the student's; None if the student's are not
            known, or the file is neither QDQ nor QONNX.
        saturation: of integer sums; None where every runtime that decides sums exactly.
        answers: how many different top-1 answers the student gives; agreement on one shows nothing.
        ties: images to which several answers are the student's; None as above.
        isolated: every layer on the runtime's own codes, by the stage; empty where the student is
            not at hand.
        metadata: what the file says of itself and is otherwise.
        graph_size: of the file that holds the graph, as text, beside that of weights (bytes), of
            OpenVINO IR; None elsewhere.
    """

    samples: int
    output_step: float
    output_step_source: str
    stages: tuple[Stage, ...]
    coverage: Coverage
    size: int
    float_size: int | None
    information_size: int | None
    narrow_layers: int | None
    tolerance: Tolerance
    skipped: Mapping[str, str]
    conformance: Conformance | None = None
    constants: tuple[Difference, ...] | None = None
    saturation: SaturationReport | None = None
    answers: int | None = None
    ties: int | None = None
    byte_layers: int | None = None
    float_layers: int | None = None
    isolated: Mapping[str, IsolatedReport] = field(default_factory=dict)
    metadata: tuple[Difference, ...] = ()
    graph_size: int | None = None

    def __str__(self) -> str:
        # By its name: what shows reports imports them.
        parts = resolve_name("sqakd_deploy.verification.showing:parity_parts")
        return as_text(parts(self))

    @property
    def explained(self) -> tuple[str, ...]:
        """Stages that answer one image otherwise, and not by their own fault."""
        return tuple(stage.name for stage in self.stages if stage.explained)

    @property
    def failures(self) -> list[str]:
        """What makes the file another function than its student, a line each; empty if proven.

        A constant that is not the student's does, even if no answer shows it; so does a layer that
        is wrong on the runtime's own codes, and what the file says of itself and is not so.
        """
        wrong = map(str, (*(self.constants or ()), *self.metadata))
        return [*wrong, *isolated_faults(self.isolated), *self.exceeded]

    @property
    def exceeded(self) -> list[str]:
        """Where answers exceed the tolerance, and which rules are broken, a line each."""
        first, *all_others = self.stages
        others = [stage for stage in all_others if stage.decides]
        found = [
            f"{stage.name}: agreement {stage.agreement:.2f} % is below "
            f"{self.tolerance.agreement:.2f} %"
            for stage in others
            if not stage.agreement >= self.tolerance.agreement
            and not self._excused(stage, 100.0 - self.tolerance.agreement)
        ]
        found += [
            f"{stage.name}: logits are off by {stage.mean_error:.2f} steps in the mean, more than "
            f"{self.tolerance.mean_error:.2f}"
            for stage in others
            if not stage.mean_error <= self.tolerance.mean_error and not stage.only_rounding
        ]
        for stage in others:
            if first.top1 is None or stage.top1 is None:
                continue
            gap = abs(stage.top1 - first.top1)
            if gap > self.tolerance.accuracy and not self._excused(stage, self.tolerance.accuracy):
                found.append(
                    f"{stage.name}: top-1 {stage.top1:.2f} % is {gap:.2f} points from the "
                    f"student's {first.top1:.2f} %, more than {self.tolerance.accuracy:.2f}"
                )
        return found if self.conformance is None else found + self.conformance.failures

    def _excused(self, stage: Stage, allowed: float) -> bool:
        """Whether what exceeds so many percent is one image's rounding, or all is; see
        :class:`Stage`."""
        return allowed > 0 and (
            stage.only_rounding or (stage.explained and allowed < 100.0 / self.samples)
        )

    @property
    def exact(self) -> tuple[str, ...]:
        """Stages that give the student's logits bit for bit."""
        return tuple(stage.name for stage in self.stages[1:] if stage.max_absolute == 0)

    def raise_for_failures(self) -> None:
        """Raise if the file exceeds the tolerance.

        Raises:
            ParityError: with every failure.
        """
        if self.failures:
            broken = self.conformance is not None and bool(self.conformance.failures)
            what = "breaks rules of its target" if broken else "is not its student"
            lines = in_one_line(self.failures, self.saturation)
            raise ParityError(f"the exported file {what}: {lines}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        facts = asdict(self) | {"passed": not self.failures, "failures": self.failures}
        del facts["conformance"]
        facts["exact"] = list(self.exact)
        if self.saturation is not None:
            facts["saturation"]["summary"] = self.saturation.summary
        return facts | conformance_facts(self)


def isolated_faults(isolated: Mapping[str, IsolatedReport]) -> list[str]:
    """Layers that are proven wrong on the runtime's own codes, a line each."""
    deciding = {stage: report for stage, report in isolated.items() if report.decides}
    return [fault for stage, report in deciding.items() for fault in report.faults(stage)]


_NAMED = 5  # failures in an error's one line; the report has all


def in_one_line(failures: Sequence[str], saturation: SaturationReport | None = None) -> str:
    """The first few failures, how many more there are, and what may be behind them."""
    more = len(failures) - _NAMED
    cause = saturation.suspicion if saturation else ""
    rest = [f"and {more} more"] if more > 0 else []
    return "; ".join([*failures[:_NAMED], *rest, *([cause] if cause else [])])


def conformance_facts(report: ParityReport) -> dict[str, Any]:
    """The rules that a report is about, for json; nothing where there are none."""
    return {} if report.conformance is None else {"conformance": report.conformance.to_dict()}


def report_of(
    path: Path,
    runs: Runs,
    expected: Expected,
    tolerance: Tolerance | None = None,
    conformance: Conformance | None = None,
    constants: Sequence[Difference] | None = None,
    saturation: SaturationReport | None = None,
    isolated: Mapping[str, IsolatedReport] | None = None,
    layerwise: NDArray[np.int64] | None = None,
) -> ParityReport:
    """Compare all answers with the expected ones.

    Args:
        path: the file.
        runs: what it answered.
        expected: what it should have.
        tolerance: what :attr:`ParityReport.failures` counts as failing.
        conformance: the rules that were checked, where the target has a profile.
        constants: those that differ, where they were compared.
        saturation: of integer sums, unless every runtime that decides sums exactly.
        isolated: every layer on the runtime's own codes, by the stage, where it was run so.
        layerwise: numbers of the images that was done on.
    """
    outputs, sizes = {expected.name: expected.logits, **runs.outputs}, expected.sizes
    *before, deployed = runs.sessions or [None]
    exact = deployed is not None and np.array_equal(outputs[deployed], expected.logits)
    return ParityReport(
        samples=len(expected.logits),
        output_step=expected.step[0],
        output_step_source=expected.step[1],
        stages=tuple(
            _stage(
                name,
                output,
                expected,
                decides=name not in runs.undecided,
                right=layerwise if _right(name, isolated or {}) else None,
                rounding=exact and name in before,
            )
            for name, output in outputs.items()
        ),
        coverage=runs.coverage,
        size=size_on_disk(path),
        float_size=sizes.float_size if sizes else None,
        information_size=sizes.information_size if sizes else None,
        narrow_layers=sizes.narrow_layers if sizes else None,
        tolerance=tolerance or Tolerance(),
        skipped=runs.skipped,
        conformance=conformance,
        constants=None if constants is None else tuple(constants),
        saturation=saturation,
        answers=len(np.unique(expected.logits.argmax(axis=1))),
        ties=int(np.sum(tied(expected.logits, expected.step[0]).sum(axis=1) > 1)),
        byte_layers=sizes.byte_layers if sizes else None,
        float_layers=sizes.float_layers if sizes else None,
        isolated=isolated or {},
        graph_size=path.stat().st_size if path.suffix == ".xml" else None,
    )


def _right(stage: str, isolated: Mapping[str, IsolatedReport]) -> bool:
    """Whether every layer was seen to be right on the runtime's own codes, and values on borders
    of codes to have fallen otherwise."""
    report = isolated.get(stage)
    if report is None or report.unseen or report.faults(stage):
        return False
    return report.differing > 0


def _stage(
    name: str,
    output: Logits,
    expected: Expected,
    *,
    decides: bool,
    right: NDArray[np.int64] | None,
    rounding: bool,
) -> Stage:
    error, (step, _) = np.abs(output.astype(np.float64) - expected.logits), expected.step
    given, differs = expected.answers(output), expected.differs(output)
    return Stage(
        name=name,
        top1=None if expected.labels is None else 100.0 * float(np.mean(given == expected.labels)),
        agreement=100.0 * float(np.mean(~differs)),
        max_error=float(error.max()) / step,
        mean_error=float(error.mean()) / step,
        max_absolute=float(error.max()),
        decides=decides,
        differing=int(differs.sum()),
        explained=bool(
            right is not None and differs.sum() == 1 and np.flatnonzero(differs)[0] in right
        ),
        only_rounding=rounding
        and right is not None
        and (not differs.any() or bool(np.isin(np.flatnonzero(differs), right).any())),
    )


def output_step(graph: IntegerGraph, logits: Logits) -> tuple[float, str]:
    """The step that logit errors are counted in, and where it comes from."""
    grid = graph.values[graph.output].grid
    if grid is not None:
        return float(grid.scale), "scale of the quantised output"
    return range_step(logits)

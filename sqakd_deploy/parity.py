"""The proof: the same images through the student in PyTorch and through the exported file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqakd_deploy.errors import ParityError
from sqakd_deploy.evaluate import Logits, accuracy, agreement, predict
from sqakd_deploy.exporting import Artifact, Coverage, get_exporter, get_runtime, stages_of
from sqakd_deploy.graph import IntegerGraph, IntWeight
from sqakd_deploy.integer import lower
from sqakd_deploy.quantization import spec_of
from sqakd_deploy.tracing import first_tensor


@dataclass(frozen=True)
class Tolerance:
    """How far an exported file may be from its student.

    Attributes:
        agreement: least top-1 agreement (percent).
        accuracy: most that top-1 accuracy may differ, where labels are known (points).
    """

    agreement: float = 99.5
    accuracy: float = 0.3


@dataclass(frozen=True)
class Stage:
    """One way of running the student, compared with the one in PyTorch.

    Attributes:
        name: which.
        top1: accuracy (percent), None without labels.
        agreement: with PyTorch, on the top-1 answer (percent).
        max_error: largest logit error (steps of the output scale).
        mean_error: mean logit error (steps).
        max_absolute: largest logit error (logits).
    """

    name: str
    top1: float | None
    agreement: float
    max_error: float
    mean_error: float
    max_absolute: float


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
        float_size: of the same weights in float32 (bytes).
        information_size: of weights at their own bits, scales and biases (bytes); what the file
            has beyond is its graph.
        narrow_layers: count of layers with weights below 8 bits; ``coverage.packed`` of them are
            stored so.
        tolerance: what was allowed.
    """

    samples: int
    output_step: float
    output_step_source: str
    stages: tuple[Stage, ...]
    coverage: Coverage
    size: int
    float_size: int
    information_size: int
    narrow_layers: int
    tolerance: Tolerance

    @property
    def failures(self) -> list[str]:
        """What exceeds the tolerance, a line each; empty if the export is proven."""
        first, *others = self.stages
        found = [
            f"{stage.name}: agreement {stage.agreement:.2f} % is below "
            f"{self.tolerance.agreement:.2f} %"
            for stage in others
            if stage.agreement < self.tolerance.agreement
        ]
        for stage in others:
            if first.top1 is None or stage.top1 is None:
                continue
            gap = abs(stage.top1 - first.top1)
            if gap > self.tolerance.accuracy:
                found.append(
                    f"{stage.name}: top-1 {stage.top1:.2f} % is {gap:.2f} points from the "
                    f"student's {first.top1:.2f} %, more than {self.tolerance.accuracy:.2f}"
                )
        return found

    def raise_for_failures(self) -> None:
        """Raise if the file exceeds the tolerance.

        Raises:
            ParityError: with every failure.
        """
        if self.failures:
            raise ParityError("the exported file is not its student: " + "; ".join(self.failures))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return asdict(self) | {"passed": not self.failures, "failures": self.failures}


def verify(
    artifact: Artifact | Path | str,
    student: nn.Module,
    images: Tensor | Iterable[object],
    *,
    labels: NDArray[np.int64] | Sequence[int] | None = None,
    tolerance: Tolerance | None = None,
) -> ParityReport:
    """Compare an exported file with its student, stage by stage.

    Args:
        artifact: the file, or what :func:`~sqakd_deploy.api.export` returned.
        student: as exported.
        images: preprocessed images ``(N, C, H, W)``, or batches of them.
        labels: of the images, where known, for accuracies.
        tolerance: what :attr:`ParityReport.failures` counts as failing.

    Returns:
        The report; call :meth:`ParityReport.raise_for_failures` to insist.
    """
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    batches = [first_tensor(b) for b in ([images] if isinstance(images, Tensor) else images)]
    runtime = get_runtime(get_exporter(spec_of(student).target).runtime)
    graph = lower(student)
    reference = predict(student, batches)
    arrays = [batch.float().numpy() for batch in batches]
    outputs = {"PyTorch student": reference}
    for name, optimize in stages_of(runtime).items():
        session = runtime.open(path, optimize=optimize)
        outputs[f"{runtime.name}, {name}"] = np.concatenate([session.run(a) for a in arrays])
    step, source = output_step(graph, reference)
    known = None if labels is None else np.asarray(labels, dtype=np.int64)
    return ParityReport(
        samples=len(reference),
        output_step=step,
        output_step_source=source,
        stages=tuple(_compare(name, o, reference, known, step) for name, o in outputs.items()),
        coverage=session.coverage(),
        size=artifact.size if isinstance(artifact, Artifact) else path.stat().st_size,
        float_size=float_size(graph),
        information_size=information_size(graph),
        narrow_layers=sum(bits < 8 for _, bits, _ in _weights(graph)),
        tolerance=tolerance or Tolerance(),
    )


def output_step(graph: IntegerGraph, logits: Logits) -> tuple[float, str]:
    """The step that logit errors are counted in, and where it comes from."""
    grid = graph.values[graph.output].grid
    if grid is not None:
        return float(grid.scale), "scale of the quantised output"
    spread = float(logits.max() - logits.min()) or 1.0  # all equal: any step will do
    return spread / 255, "1/255 of the logits' range"


def _compare(
    name: str, output: Logits, reference: Logits, labels: NDArray[np.int64] | None, step: float
) -> Stage:
    error = np.abs(output.astype(np.float64) - reference)
    return Stage(
        name=name,
        top1=None if labels is None else accuracy(output, labels),
        agreement=agreement(output, reference),
        max_error=float(error.max()) / step,
        mean_error=float(error.mean()) / step,
        max_absolute=float(error.max()),
    )


def _weights(graph: IntegerGraph) -> list[tuple[int, int, int]]:
    """(weights, bits each, output channels) of every layer with integer weights or float ones."""
    found = []
    for node in graph.nodes:
        weight = getattr(node, "weight", None)
        if isinstance(weight, IntWeight):
            found.append((weight.codes.size, weight.bits, weight.codes.shape[0]))
        elif weight is not None:
            found.append((weight.size, 32, weight.shape[0]))
    return found


def float_size(graph: IntegerGraph) -> int:
    """Bytes of the same weights and biases in float32, BatchNorm folded."""
    return sum(4 * (count + channels) for count, _, channels in _weights(graph))


def expected_size(graph: IntegerGraph) -> int:
    """Bytes of weights (one each, four if float), scales and biases in an exported file."""
    stored = sum(count * (4 if bits == 32 else 1) for count, bits, _ in _weights(graph))
    return stored + sum(8 * channels for *_, channels in _weights(graph))


def information_size(graph: IntegerGraph) -> int:
    """Bytes of the weights at their own bits, scales and biases beside them."""
    packed = sum(count * bits for count, bits, _ in _weights(graph)) // 8
    return packed + sum(8 * channels for *_, channels in _weights(graph))

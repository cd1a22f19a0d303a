"""The proof: the same images through the student in PyTorch and through the exported file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqakd_deploy.errors import DataError, ExportError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.exporting import Artifact, conformance_of
from sqakd_deploy.integer import lower
from sqakd_deploy.plugins import get_exporter, get_runtime
from sqakd_deploy.quantization import spec_of
from sqakd_deploy.tracing import first_tensor
from sqakd_deploy.verification.constants import constants_of
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.saturation import saturation_in, sums_exactly
from sqakd_deploy.verification.sizes import expected_size, float_size, information_size, sizes_of
from sqakd_deploy.verification.stages import (
    Expected,
    ParityReport,
    Stage,
    Tolerance,
    output_step,
    report_of,
    run_stages,
)
from sqakd_deploy.verification.verifying import differences_of

__all__ = [
    "ParityReport",
    "Stage",
    "Tolerance",
    "expected_size",
    "float_size",
    "information_size",
    "output_step",
    "verify",
]


def verify(
    artifact: Artifact | Path | str,
    student: nn.Module,
    images: Tensor | Iterable[object],
    *,
    labels: NDArray[np.int64] | Sequence[int] | None = None,
    tolerance: Tolerance | None = None,
) -> ParityReport:
    """Compare an exported file with its student: the constants, and the answers stage by stage.

    Constants are compared in QDQ files, by the names of the layers.

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
    if not sum(map(len, batches)):
        raise DataError("wanted at least one image to compare on, got none")
    name = artifact.exporter if isinstance(artifact, Artifact) else spec_of(student).target
    exporter = get_exporter(name)
    runtime = get_runtime(exporter.runtime)
    graph = lower(student)
    reference = predict(student, batches)
    known = None if labels is None else np.asarray(labels, dtype=np.int64)
    expected = Expected(
        "PyTorch student", reference, known, output_step(graph, reference), sizes_of(graph)
    )
    arrays = [batch.detach().float().cpu().numpy() for batch in batches]
    runs = run_stages(path, arrays, expected, runtime)
    try:
        differences = differences_of(QdqFile(path), constants_of(graph))
    except ExportError:  # of another format than ONNX; the runtime has opened it
        differences = None
    saturation = None if sums_exactly(runtime) else saturation_in(graph)
    rules = conformance_of(exporter, path)
    return report_of(path, runs, expected, tolerance, rules, differences, saturation)

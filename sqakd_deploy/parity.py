"""The proof: the same images through the student in PyTorch and through the exported file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqakd_deploy.errors import DataError, ExportError
from sqakd_deploy.exporting import Artifact, conformance_of
from sqakd_deploy.given import images_in
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.modes import in_plain_mode
from sqakd_deploy.plugins import get_exporter, get_runtime
from sqakd_deploy.quantization import input_shape_of, spec_of
from sqakd_deploy.verification.comparing import differences_of
from sqakd_deploy.verification.converting import converter_of
from sqakd_deploy.verification.ir_file import conversion_of
from sqakd_deploy.verification.isolated import IMAGES
from sqakd_deploy.verification.isolating import isolator_of
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.running import run_stages
from sqakd_deploy.verification.saturation import saturation_in, sums_exactly
from sqakd_deploy.verification.sizes import expected_size, float_size, information_size
from sqakd_deploy.verification.stages import (
    ParityReport,
    Stage,
    Tolerance,
    output_step,
    report_of,
)
from sqakd_deploy.verification.student import reference_of
from sqakd_deploy.verification.verifying import isolated_stages

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


@in_plain_mode
def verify(
    artifact: Artifact | Path | str,
    student: nn.Module,
    images: Tensor | Iterable[object],
    *,
    labels: NDArray[np.int64] | Sequence[int] | None = None,
    tolerance: Tolerance | None = None,
) -> ParityReport:
    """Compare an exported file with its student: the answers stage by stage, constants, and layers.

    Constants are compared in QDQ and QONNX files, by the names of the layers. There the student is
    also run layer by layer on the codes that the runtime computed, for the few images that differ
    most. OpenVINO IR is compared with a conversion of the student, layer for layer, and what that
    was converted from with the student, as any QDQ file.

    Args:
        artifact: the file, or what :func:`~sqakd_deploy.api.export` returned.
        student: as exported.
        images: preprocessed images ``(N, C, H, W)``, or batches of them.
        labels: of the images, where known, for accuracies.
        tolerance: what :attr:`ParityReport.failures` counts as failing.

    Returns:
        The report; call :meth:`ParityReport.raise_for_failures` to insist.

    Raises:
        DataError: if there is no image, or one of another form than the student takes, or another
            number of labels than of images.
    """
    path = artifact.path if isinstance(artifact, Artifact) else Path(artifact)
    shape = input_shape_of(student)
    batches = [images_in(b, shape) for b in ([images] if isinstance(images, Tensor) else images)]
    count = sum(map(len, batches))
    if not count:
        raise DataError("wanted at least one image to compare on, got none")
    name = artifact.exporter if isinstance(artifact, Artifact) else spec_of(student).target
    exporter = get_exporter(name)
    runtime = get_runtime(exporter.runtime)
    known = None if labels is None else np.asarray(labels, dtype=np.int64)
    if known is not None and known.shape != (count,):
        raise DataError(f"labels: wanted one for each of {count} images, got {known.shape}")
    reference = reference_of(student, batches, labels=known)
    expected = reference.expected()
    runs = run_stages(path, reference.batches, expected, runtime)
    differences, isolated, worst = None, {}, None
    file = _file(path)
    if file is not None and reference.constants is not None:
        conversion = conversion_of(file, converter_of(student))
        differences = differences_of(conversion, reference.constants, reference.operators)
        worst = runs.worst_images(expected, IMAGES)
        isolator, farthest = isolator_of(student), reference.images(worst)
        isolated = isolated_stages(isolator, conversion.file, runtime, farthest, runs.sessions)
    spec = spec_of(student).model_copy(update={"target": name})
    saturation = None if sums_exactly(runtime) else saturation_in(lower(student), spec)
    rules = conformance_of(exporter, path)
    return report_of(
        path, runs, expected, tolerance, rules, differences, saturation, isolated, worst
    )


def _file(path: Path) -> OnnxFile | None:
    """The file's constants; None of a format not read here, which the runtime has opened."""
    try:
        return read_file(path)
    except ExportError:
        return None

"""Five lines from a trained model to a proven file; the command line calls the same functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqakd_deploy.errors import ExportError, SpecError
from sqakd_deploy.exporting import Artifact, ExportOptions, packs_of
from sqakd_deploy.integer import lower
from sqakd_deploy.parity import ParityReport, Tolerance, verify
from sqakd_deploy.pixels import fed_as
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.quantization import spec_of


def export(
    student: nn.Module,
    path: Path | str,
    *,
    options: ExportOptions | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Artifact:
    """Write a student for the target that it was trained for.

    Args:
        student: trained or calibrated.
        path: of the file; replaced as a whole if it exists.
        options: opset, names, packing, kind of input and batch.
        metadata: strings that travel in the file, beside the spec; raw pixels as input need the
            preprocessing among them.

    Raises:
        ExportError: if the folder does not exist or a layer cannot be written, naming it.
        SpecError: if the options insist on packed weights and the target cannot restore them, or
            want raw pixels and the metadata do not say how they are prepared.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"the folder {target.parent} does not exist; make it, or choose another")
    exporter, options = get_exporter(spec_of(student).target), options or ExportOptions()
    if options.pack and not packs_of(exporter):
        raise SpecError(
            f"target {exporter.name!r} does not restore packed weights at load; leave out --pack"
        )
    graph, form = fed_as(lower(student, metadata), options)
    return replace(exporter.export(graph, target, options), input_form=form)


def export_proven(
    student: nn.Module,
    path: Path | str,
    images: Tensor | Iterable[object],
    *,
    labels: NDArray[np.int64] | Sequence[int] | None = None,
    tolerance: Tolerance | None = None,
    options: ExportOptions | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Artifact, ParityReport]:
    """Export, compare with the student, and only then give the file its name.

    Args:
        student: as for :func:`export`.
        path: where the file appears if, and only if, it passes.
        images: to compare on, as for :func:`~sqakd_deploy.parity.verify`.
        labels: as for :func:`~sqakd_deploy.parity.verify`.
        tolerance: what passes.
        options: as for :func:`export`.
        metadata: as for :func:`export`.

    Returns:
        The file, and its report, which may have failed: then no file exists under the name.
    """
    target = Path(path)
    trial = target.with_name(f".{target.stem}.unproven{target.suffix}")
    written = [trial]
    try:
        artifact = export(student, trial, options=options, metadata=metadata)
        written = [*artifact.companions, trial]
        report = verify(artifact, student, images, labels=labels, tolerance=tolerance)
        if not report.failures:
            artifact = _renamed(artifact, target)
    finally:
        for file in written:
            file.unlink(missing_ok=True)
    return artifact, report


def _renamed(artifact: Artifact, target: Path) -> Artifact:
    """Give a file and its companions their names; the file comes last, when all is there."""
    moved = [file.replace(target.with_suffix(file.suffix)) for file in artifact.companions]
    artifact.path.replace(target)
    return replace(artifact, path=target, companions=tuple(moved))

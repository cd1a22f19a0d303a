"""Five lines from a trained model to a proven file; the command line calls the same functions."""

from __future__ import annotations

import glob
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sqakd_deploy import quantization
from sqakd_deploy.abilities import check_form
from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import (
    Artifact,
    ExportOptions,
    ProfileExporter,
    conformance_of,
)
from sqakd_deploy.lowering.borders import settle
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.modes import in_plain_mode
from sqakd_deploy.parity import ParityReport, Tolerance, verify
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.quantization import spec_of
from sqakd_deploy.retargeting import changes
from sqakd_deploy.writing import write


@in_plain_mode
def calibrate(student: nn.Module, images: Tensor | Iterable[object]) -> None:
    """Set every activation range from unlabelled images, and leave a student that can be exported.

    As :func:`sqakd_deploy.quantization.calibrate`, with which training begins; then, as at the end
    of training, steps are moved off the borders between codes and biases onto the integers that
    they become (:func:`~sqakd_deploy.lowering.borders.settle`), so that all runtimes round alike.

    Args:
        student: changed in place.
        images: preprocessed images ``(N, C, H, W)``, or batches of them (of a batch that is a
            tuple, the first element; nothing else is looked at).

    Raises:
        DataError: if there is no image, or too few in a batch for BatchNorm.
    """
    quantization.calibrate(student, images)
    settle(student)


@in_plain_mode
def export(
    student: nn.Module,
    path: Path | str,
    *,
    target: str | None = None,
    anyway: bool = False,
    options: ExportOptions | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Artifact:
    """Write a student for the target that it was trained for.

    Args:
        student: trained or calibrated.
        path: of the file; replaced as a whole if it exists.
        target: another target than that.
        anyway: write for it even where its rules would have placed quantizers otherwise.
        options: opset, names, packing, kind of input and batch.
        metadata: strings that travel in the file, beside the spec; raw pixels as input need the
            preprocessing among them.

    Raises:
        ExportError: if the folder does not exist, the path is one itself, or a layer cannot be
            written, naming it; if the file breaks a documented rule of a target that it cannot be
            run in.
        SpecError: if no file of the target has such a name or opset; if the options insist on
            packed weights and the target cannot restore them, or want raw pixels and the metadata
            do not say how they are prepared; if another target would have placed quantizers
            otherwise.
    """
    final = Path(path)
    exporter = get_exporter(target or spec_of(student).target)
    check_folder(final)
    check_form(exporter, final, options.opset if options else None)
    asked = (target, anyway, options, metadata)
    if not isinstance(exporter, ProfileExporter):
        return write(student, final, *asked)
    with _trial(final) as trial:
        artifact = write(student, trial, *asked)
        conformance = conformance_of(exporter, trial)
        if conformance is not None and conformance.failures:
            raise ExportError(f"{final}: {'; '.join(conformance.failures)}")
        return _renamed(artifact, final)


def would_change(student: nn.Module, target: str) -> list[str]:
    """What training for another target would have changed, a line each; empty if nothing.

    Args:
        student: trained or calibrated.
        target: the other target's name.

    Raises:
        SpecError: if there is no such target.
    """
    trained, wanted = get_exporter(spec_of(student).target), get_exporter(target)
    return changes(lower(student), trained.placement, wanted.placement)


@in_plain_mode
def export_proven(
    student: nn.Module,
    path: Path | str,
    images: Tensor | Iterable[object],
    *,
    labels: NDArray[np.int64] | Sequence[int] | None = None,
    tolerance: Tolerance | None = None,
    target: str | None = None,
    anyway: bool = False,
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
        target: as for :func:`export`.
        anyway: as for :func:`export`.
        options: as for :func:`export`.
        metadata: as for :func:`export`.

    Returns:
        The file, and its report, which may have failed: then no file exists under the name.

    Raises:
        ExportError: as :func:`export`; a path that cannot be is refused before any work.
        SpecError: as :func:`export`.
    """
    final = Path(path)
    check_folder(final)
    exporter = get_exporter(target or spec_of(student).target)
    check_form(exporter, final, options.opset if options else None)
    with _trial(final) as trial:
        artifact = write(student, trial, target, anyway, options, metadata)
        report = verify(artifact, student, images, labels=labels, tolerance=tolerance)
        if not report.failures:
            artifact = _renamed(artifact, final)
    return artifact, report


def check_folder(path: Path) -> None:
    """Refuse a file whose folder is not there, or that is a folder itself.

    Raises:
        ExportError: if so.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file in it, for instance model.onnx")
    if not path.parent.is_dir():
        raise ExportError(f"the folder {path.parent} does not exist; make it, or choose another")


@contextmanager
def _trial(final: Path) -> Iterator[Path]:
    """A name beside ``final`` that no other export has, for the file until it is proven.

    Yields:
        The path to write to. What is left of the file and its companions is removed in the end;
        errors speak of ``final``.
    """
    stem = f".{final.stem}.{secrets.token_hex(4)}.unproven"
    try:
        yield final.with_name(stem + final.suffix)
    except ExportError as error:
        if stem not in str(error):
            raise
        raise ExportError(str(error).replace(stem, final.stem)) from error
    finally:
        for file in final.parent.glob(f"{glob.escape(stem)}*"):
            file.unlink(missing_ok=True)


def _renamed(artifact: Artifact, target: Path) -> Artifact:
    """Give a file and its companions their names; the file comes last, when all is there."""
    try:
        moved = [file.replace(target.with_suffix(file.suffix)) for file in artifact.companions]
        artifact.path.replace(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror}") from error
    return replace(artifact, path=target, companions=tuple(moved))

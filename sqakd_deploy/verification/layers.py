"""Every quantised tensor of a file against the student's, and where differences begin.

A difference *begins* in a tensor for those images for which the nearest quantised tensors before it
are the same on both sides, and it is not; elsewhere it is handed down. The stage it begins in:

- **export**: the unoptimised runtime, which runs the file as written, differs from the student, and
  either the constants in front of the tensor are not the student's, or it differs by more than
  rounding does.
- **optimiser**: a runtime differs, by more than rounding, from the unoptimised one, which ran the
  same file: it rewrote the graph into another function (or a kernel saturates: rule 19).
- **kernel**: either differs by rounding alone: sums are added in another order, scales are
  multiplied in another width, and a value beside the border of two codes falls on the other side
  (rule 20).

Whichever it is, the runtime's tensor is not the student's: where it is, and the unoptimised one's
is not, the difference begins in the latter alone.

Rounding is at most :data:`ROUNDING_STEPS` steps for at most :data:`ROUNDING_SHARE` of the codes, or
:data:`ROUNDING_CODES` of them. A
fault that does so little is told from it only if it lies in a constant. Behind a tensor that
differs for all images, later faults do not show here; comparing constants
(:mod:`~sqakd_deploy.verification.constants`) and running the student on the runtime's own codes
(:mod:`~sqakd_deploy.verification.isolated`) find those as well. What :mod:`taps
<sqakd_deploy.verification.taps>` cannot read is listed as unseen; a difference behind it may have
begun there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import ParityError
from sqakd_deploy.exporting import Runtime, named_stages
from sqakd_deploy.verification.isolated import IsolatedReport
from sqakd_deploy.verification.onnx_layers import OnnxFile, Quantized
from sqakd_deploy.verification.reference import Tensor
from sqakd_deploy.verification.taps import read_codes
from sqakd_deploy.words import counted

ROUNDING_STEPS = 1.01
"""Rule 20: one step; the rest is for scales that were multiplied in float32."""

ROUNDING_SHARE = 0.1
"""Codes that rounding may move: a Gemm's float bias, rounded to int32, moves 9 %."""

ROUNDING_CODES = 3
"""So few codes are rounding whatever their share: of one image's five answers, one is a fifth."""

Kind: TypeAlias = Literal["export", "optimiser", "kernel"]
KINDS: tuple[Kind, ...] = ("export", "optimiser", "kernel")


@dataclass(frozen=True)
class TensorStage:
    """A tensor in one way of running the file, against the student's.

    Attributes:
        stage: which way.
        max_error: largest error (steps of the student's scale).
        mean_error: mean error (steps).
        share: codes that differ (percent).
        snr: signal-to-noise ratio (dB); None where there is no noise.
    """

    stage: str
    max_error: float
    mean_error: float
    share: float
    snr: float | None


@dataclass(frozen=True)
class Begin:
    """A difference that begins in a tensor.

    Attributes:
        kind: what it is due to.
        stage: in which way of running the file.
        images: count of images for which it begins here.
        max_error: the largest (steps).
        share: codes that differ, of the images whose inputs to this tensor are the same (percent).
        or_in: unseen tensors before it, in which the difference may have begun.
    """

    kind: Kind
    stage: str
    images: int
    max_error: float
    share: float
    or_in: tuple[str, ...]


@dataclass(frozen=True)
class TensorReport:
    """A quantised tensor.

    Attributes:
        name: of its quantizer.
        position: in topological order, from 0.
        stages: each way of running the file.
        begins: differences that begin here.
    """

    name: str
    position: int
    stages: tuple[TensorStage, ...]
    begins: tuple[Begin, ...]

    @property
    def worst(self) -> tuple[float, float, int]:
        """Sorts reports: largest error, share of codes, and the earlier one first."""
        errors = max((stage.max_error for stage in self.stages), default=0.0)
        shares = max((stage.share for stage in self.stages), default=0.0)
        return -errors, -shares, self.position


@dataclass(frozen=True)
class LayersReport:
    """All quantised tensors.

    Attributes:
        images: compared.
        tensors: worst first.
        unseen: quantizers whose tensors cannot be read, by the stage.
        missing: the student's quantizers that the file does not have.
        unsupported: why tensors that it does have were not compared, by their quantizers.
        isolated: every tensor on the runtime's own codes before it, by the stage, where the student
            is at hand.
    """

    images: int
    tensors: tuple[TensorReport, ...]
    unseen: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]
    isolated: Mapping[str, IsolatedReport] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)

    @property
    def begun(self) -> tuple[TensorReport, ...]:
        """Tensors in which differences begin, in topological order."""
        begun = [tensor for tensor in self.tensors if tensor.begins]
        return tuple(sorted(begun, key=lambda tensor: tensor.position))

    def faults(self, stages: Collection[str]) -> list[str]:
        """Tensors in which more than rounding begins in one of some stages, a line each.

        Where tensors before it are unseen, it may have begun there, as rounding.
        """
        return [
            f"{tensor.name}: differences beyond rounding begin here ({begin.stage}, "
            f"{counted(begin.images, 'image')}, {begin.share:.2f} % of the codes, up to "
            f"{begin.max_error:.2f} steps)"
            for tensor in self.begun
            for begin in tensor.begins
            if begin.kind != "kernel" and begin.stage in stages and not begin.or_in
        ]

    @property
    def first(self) -> TensorReport | None:
        """The first of them; None if there is none."""
        return next(iter(self.begun), None)


def compare_layers(
    file: OnnxFile,
    images: NDArray[np.float32],
    expected: Mapping[str, Tensor],
    runtime: Runtime,
    *,
    others: Mapping[str, Runtime] | None = None,
    wrong: Collection[str] = (),
) -> LayersReport:
    """Compare every quantised tensor that the file and the student both have.

    Args:
        file: the file.
        images: ``(M, C, H, W)``.
        expected: the student's tensors for these images.
        runtime: that proves the file; runs it in each of its stages.
        others: more runtimes, which must be able to open it.
        wrong: layers whose constants are not the student's.

    Raises:
        ExportError: if a runtime cannot run the file.
        ParityError: if a tensor has another shape than the student's.
    """
    quantized = file.quantized
    names = [name for name in expected if name in quantized]
    shapes = {name: expected[name].codes.shape[1:] for name in names}
    runs = {name: (runtime, optimize) for name, optimize in named_stages(runtime).items()}
    runs |= {name: (other, True) for name, other in (others or {}).items()}
    errors: dict[str, dict[str, NDArray[np.float32]]] = {}
    unseen = {}
    for stage, (opened, optimize) in runs.items():
        seen = read_codes(file, opened, images, shapes, optimize=optimize)
        errors[stage] = {
            name: _error(name, codes, quantized[name], expected[name])
            for name, codes in seen.codes.items()
        }
        if seen.unseen:
            unseen[stage] = seen.unseen
    comparison = _Comparison(quantized, errors, wrong)
    reports = [_report(name, i, expected[name], comparison) for i, name in enumerate(names)]
    unsupported = {name: why for name, why in file.unsupported.items() if name in expected}
    missing = tuple(name for name in expected if name not in quantized and name not in unsupported)
    ordered = tuple(sorted(reports, key=lambda report: report.worst))
    return LayersReport(len(images), ordered, unseen, missing, unsupported=unsupported)


def _error(
    name: str, codes: NDArray[np.uint8], found: Quantized, expected: Tensor
) -> NDArray[np.float32]:
    """``(M, …)``: the file's real numbers less the student's, in steps of the student's scale."""
    if codes.shape != expected.codes.shape:
        raise ParityError(
            f"{name}: wanted codes {expected.codes.shape}, the file has {codes.shape}"
        )
    ratio = found.scale / expected.scale  # exactly 1 where the scales are the same
    theirs = expected.codes.astype(np.float32) - np.float32(expected.zero_point)
    ours = (codes.astype(np.float32) - np.float32(found.zero_point)) * np.float32(ratio)
    return ours - theirs


@dataclass(frozen=True)
class _Comparison:
    """Everything that reports are made of.

    Attributes:
        quantized: tensors of the file.
        errors: of each stage, ``(M, …)`` by the tensor's name (steps); the first is the base.
        wrong: layers whose constants are not the student's.
    """

    quantized: Mapping[str, Quantized]
    errors: Mapping[str, Mapping[str, NDArray[np.float32]]]
    wrong: Collection[str]

    @property
    def base(self) -> str:
        """The stage that the student is compared with; others are compared with it."""
        return next(iter(self.errors))

    def change(self, stage: str, name: str) -> NDArray[np.float32] | None:
        """``(M, size)``: a stage less what it is compared with; None where either is unseen."""
        own, base = self.errors[stage].get(name), self.errors[self.base].get(name)
        if own is None or base is None:
            return None
        change = own if stage == self.base else own - base
        return change.reshape(len(change), -1)

    def before(self, stage: str, name: str) -> tuple[list[NDArray[np.float32]], tuple[str, ...]]:
        """Changes of the nearest seen tensors before one, and the unseen tensors between."""
        changes, unseen, left = [], [], list(self.quantized[name].parents)
        while left:
            parent = left.pop()
            change = self.change(stage, parent)
            if change is not None:
                changes.append(change)
            elif parent not in unseen:
                unseen.append(parent)
                left += self.quantized[parent].parents
        return changes, tuple(unseen)


def _report(name: str, position: int, expected: Tensor, comparison: _Comparison) -> TensorReport:
    errors = comparison.errors
    seen = [stage for stage in errors if name in errors[stage]]
    stages = tuple(_stage(stage, errors[stage][name], expected) for stage in seen)
    begins = [_begin(name, stage, comparison) for stage in seen]
    return TensorReport(name, position, stages, tuple(b for b in begins if b is not None))


def _stage(stage: str, error: NDArray[np.float32], expected: Tensor) -> TensorStage:
    size = np.abs(error)
    signal = np.square(expected.codes.astype(np.float32) - expected.zero_point).sum(dtype=float)
    noise = np.square(error).sum(dtype=float)
    ratio = 10 * math.log10(signal / noise) if noise and signal else None
    share = 100 * float(np.mean(error != 0))
    return TensorStage(stage, float(size.max()), float(size.mean()), share, ratio)


def _begin(name: str, stage: str, comparison: _Comparison) -> Begin | None:
    """What begins in a tensor, or in unseen ones right before it."""
    own = comparison.change(stage, name)
    if own is None:
        return None
    before, unseen = comparison.before(stage, name)
    eligible = np.ones(len(own), bool)
    for change in before:
        eligible &= ~change.any(axis=1)
    error = comparison.errors[stage][name].reshape(own.shape)
    begun = own[eligible & own.any(axis=1) & error.any(axis=1)]
    if not len(begun):
        return None
    moved, codes = np.count_nonzero(begun), own[eligible].size
    largest, share = float(np.abs(begun).max()), moved / codes
    few = moved <= max(ROUNDING_CODES, ROUNDING_SHARE * codes)
    rounding = largest <= ROUNDING_STEPS and few
    kind: Kind = "kernel" if rounding else "optimiser"
    if stage == comparison.base:
        tensor = comparison.quantized[name]
        faulty = bool({*tensor.layers, *tensor.parents, *unseen}.intersection(comparison.wrong))
        kind = "export" if faulty or not rounding else "kernel"
    return Begin(kind, stage, len(begun), largest, 100 * share, unseen)

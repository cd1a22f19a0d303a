"""Everything that can be said of a file against a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.consoles import as_text
from sqakd_deploy.errors import DataError, ParityError, SpecError
from sqakd_deploy.exporting import (
    Conformance,
    Exporter,
    Runtime,
    Session,
    conformance_of,
    named_stages,
)
from sqakd_deploy.plugins import exporters, get_exporter, get_runtime, runtimes_for
from sqakd_deploy.verification.comparing import differences_of
from sqakd_deploy.verification.constants import Difference
from sqakd_deploy.verification.ir_file import Converter, IrFile, conversion_of
from sqakd_deploy.verification.isolated import (
    IMAGES,
    SIMULATED,
    IsolatedReport,
    Isolator,
)
from sqakd_deploy.verification.layers import LayersReport, compare_layers
from sqakd_deploy.verification.metadata import metadata_differences
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.reference import Reference, Tensor
from sqakd_deploy.verification.running import Runs, run_stages
from sqakd_deploy.verification.saturation import SaturationReport, saturation_of, sums_exactly
from sqakd_deploy.verification.stages import (
    ParityReport,
    Tolerance,
    conformance_facts,
    in_one_line,
    isolated_faults,
    report_of,
)

_DEFAULT_RUNTIMES = {".xml": "openvino"}
"""By the file's suffix; ONNX Runtime where it has another."""

Recorder: TypeAlias = Callable[[NDArray[np.float32]], Mapping[str, Tensor]]
"""The student's quantised tensors for images ``(M, C, H, W)``."""


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        parity: the logits, stage by stage, and the constants.
        layers: every quantised tensor, where asked for and known.
        saturation: which layers can saturate on CPUs without VNNI.
        reference: what the file was compared with, recorded tensors included.
        unknown: why layers, and constants if they are None, were not compared, of OpenVINO IR.
    """

    parity: ParityReport
    layers: LayersReport | None
    saturation: SaturationReport
    reference: Reference = field(repr=False)
    unknown: str | None = None

    def __str__(self) -> str:
        # By its name: what shows reports imports them.
        parts = resolve_name("sqakd_deploy.verification.showing:verification_parts")
        return as_text(parts(self))

    @property
    def constants(self) -> tuple[Difference, ...] | None:
        """Those of the file that are not the student's; None where they were not compared."""
        return self.parity.constants

    @property
    def failures(self) -> list[str]:
        """What makes the file another function than its student, a line each.

        Beside the parity's failures, layers that are wrong on the runtime's own codes, on as many
        images as layers were asked for; where there is no student to run on these, tensors in which
        more than rounding begins.
        """
        wrong = map(str, (*(self.constants or ()), *self.parity.metadata))
        return [*wrong, *self._wrong_layers(), *self.parity.exceeded]

    def _wrong_layers(self) -> list[str]:
        if self.layers is None:
            return isolated_faults(self.parity.isolated)
        if self.layers.isolated:
            return isolated_faults(self.layers.isolated)
        return self.layers.faults([stage.name for stage in self.parity.stages if stage.decides])

    def raise_for_failures(self) -> None:
        """Raise if the file is not its student.

        Raises:
            ParityError: with the first failures.
        """
        if self.failures:
            lines = in_one_line(self.failures, self.parity.saturation)
            raise ParityError(f"the file is not its student: {lines}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        facts = asdict(replace(self, reference=None))  # type: ignore[arg-type]
        del facts["reference"], facts["parity"]["conformance"], facts["parity"]["saturation"]
        facts["constants"] = facts["parity"].pop("constants")
        facts["parity"] |= conformance_facts(self.parity)
        facts["saturation"]["summary"] = self.saturation.summary
        if self.layers is not None:
            facts["layers"]["first"] = self.layers.first.name if self.layers.first else None
        return facts | {"passed": not self.failures, "failures": self.failures}


def verify_file(
    path: Path,
    reference: Reference,
    *,
    tolerance: Tolerance | None = None,
    layer_samples: int = 0,
    recorder: Recorder | None = None,
    isolator: Isolator | None = None,
    converter: Converter | None = None,
    others: Mapping[str, Runtime] | None = None,
) -> Verification:
    """Compare a file with a student's answers, constants and tensors, as far as these are known.

    Args:
        path: of an ONNX file, or of OpenVINO IR.
        reference: the student's answers.
        tolerance: of the logits.
        layer_samples: images to compare quantised tensors on; 0 leaves them out.
        recorder: gives the student's tensors for the images whose answers are farthest off; None
            takes those of the reference, whatever images they are of.
        isolator: runs the student on the runtime's own codes, layer by layer, for the same images,
            or a few if no layers are compared.
        converter: compares OpenVINO IR with a conversion of the student. Without it, and where it
            cannot tell, or finds another graph, layers are not compared in IR.
        others: runtimes that take part, and whose answers count; None takes all installed that can
            open the file, whose answers are shown and decide nothing: the file was placed for the
            one that proves it. Where that is not installed, the first of those named takes its
            place.

    Raises:
        SpecError: if no installed runtime proves files of its target, and none is named.
        ExportError: if the file cannot be read, or its runtime cannot run it.
        ParityError: if answers or tensors have other shapes than the student's, or a file that
            takes pixels says otherwise than the student how these are prepared.
        DataError: if tensors are asked for and there are none.
    """
    file = read_file(path)
    runtime = proving_runtime(file, others)
    named, others = others is not None, runtimes_for(path) if others is None else others
    others = {name: other for name, other in others.items() if name != runtime.name}
    expected = reference.expected()
    stated = _metadata(file, reference)
    batches = _batches(file, reference)
    runs = run_stages(path, batches, expected, runtime, others, others_decide=named)
    conversion = conversion_of(file, converter)
    file, differences = conversion.file, None
    if reference.constants is not None:
        differences = differences_of(conversion, reference.constants, reference.operators)
    layers = None
    if layer_samples and not isinstance(file, IrFile):
        reference = _with_tensors(reference, runs, layer_samples, recorder)
        able = {name: other for name, other in others.items() if name not in runs.skipped}
        wrong = {difference.layer for difference in differences or ()}
        layers = _layers(file, reference, layer_samples, runtime, able, wrong)
    isolated: Mapping[str, IsolatedReport] = {}
    which: NDArray[np.int64] | None = None
    if isolator is not None:
        which = reference.tensor_images if layers else runs.worst_images(expected, IMAGES)
        assert which is not None  # see _with_tensors
        which = which[: layer_samples or IMAGES]
        images = reference.images(which)
        isolated = isolated_stages(isolator, file, runtime, images, runs.sessions)
    saturation = saturation_of(file)
    deciding = [runtime, *(others.values() if named else ())]
    suspect = None if all(map(sums_exactly, deciding)) else saturation
    rules = _conformance(file)
    parity = report_of(
        path, runs, expected, tolerance, rules, differences, suspect, isolated, which
    )
    parity = replace(parity, metadata=stated)
    if layers is not None:
        layers, parity = replace(layers, isolated=isolated), replace(parity, isolated={})
    return Verification(parity, layers, saturation, reference, conversion.unknown)


def _metadata(file: OnnxFile, reference: Reference) -> tuple[Difference, ...]:
    """What a file says of itself and is otherwise.

    Raises:
        ParityError: if that keeps images from being fed to it: raw pixels are made of prepared
            images by what the file says of them.
    """
    image, answers = next(iter(reference.batches)).shape[1:], reference.logits.shape[1]
    found = metadata_differences(file, reference.metadata or {}, image, answers)
    if found and file.takes_pixels:
        raise ParityError(f"the file is not its student: {in_one_line([*map(str, found)])}")
    return tuple(found)


def _batches(file: OnnxFile, reference: Reference) -> list[NDArray[np.float32]]:
    """The images in batches that the file takes."""
    if file.batch is None:
        return list(reference.batches)
    return [b[i : i + file.batch] for b in reference.batches for i in range(0, len(b), file.batch)]


def _with_tensors(
    reference: Reference, runs: Runs, count: int, recorder: Recorder | None
) -> Reference:
    """The reference with tensors: its own, or recorded for the images that are farthest off."""
    if recorder is not None:
        worst = runs.worst_images(reference.expected(), count)
        return replace(reference, tensors=recorder(reference.images(worst)), tensor_images=worst)
    if not reference.tensors or reference.tensor_images is None:
        raise DataError(
            "the reference has no tensors to compare layers with; save it with --layers, or "
            "verify against the run"
        )
    return reference


def proving_runtime(file: OnnxFile, named: Mapping[str, Runtime] | None = None) -> Runtime:
    """The runtime of the target that a file was written for; that of its format if it says none.

    Args:
        file: the file.
        named: runtimes that were asked for, of which the first proves a file whose target is not
            installed here.

    Raises:
        SpecError: if the target is not installed, or lacks a package, and no runtime is named.
    """
    if file.target is None:
        return get_runtime(_DEFAULT_RUNTIMES.get(file.path.suffix, "onnxruntime"))
    try:
        return get_runtime(get_exporter(file.target).runtime)
    except SpecError as error:
        if named:
            return next(iter(named.values()))
        raise SpecError(
            f"{file.path} was written for {file.target!r}, which cannot prove it here: {error}; or "
            "name the runtime that proves it instead, as --runtime onnxruntime"
        ) from error


def _exporter(file: OnnxFile) -> Exporter | None:
    """The exporter of the target that a file was written for, if it says and has one here."""
    return None if file.target is None else exporters().get(file.target)


def _conformance(file: OnnxFile) -> Conformance | None:
    exporter = _exporter(file)
    return None if exporter is None else conformance_of(exporter, file.path)


def _layers(
    file: OnnxFile,
    reference: Reference,
    count: int,
    runtime: Runtime,
    others: Mapping[str, Runtime],
    wrong: set[str],
) -> LayersReport:
    assert reference.tensors is not None  # see _with_tensors
    assert reference.tensor_images is not None
    tensors = {
        name: replace(tensor, codes=tensor.codes[:count])
        for name, tensor in reference.tensors.items()
    }
    images = reference.images(reference.tensor_images[:count])
    return compare_layers(file, images, tensors, runtime, others=others, wrong=wrong)


def isolated_stages(
    isolator: Isolator,
    file: OnnxFile,
    runtime: Runtime,
    images: NDArray[np.float32],
    sessions: Mapping[str, Session],
) -> dict[str, IsolatedReport]:
    """Every tensor on the runtime's own codes, by the stage, and the student's simulation on its
    integers' codes; nothing of files in no form known here."""
    if not file.known_form:
        return {}
    return {SIMULATED: isolator.simulated(images)} | {
        name: isolator(file, runtime, images, optimize, sessions[name])
        for name, optimize in named_stages(runtime).items()
    }

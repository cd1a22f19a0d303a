"""Everything that can be said of a file against a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqakd_deploy.errors import DataError, ParityError
from sqakd_deploy.exporting import Runtime, exporters, get_exporter, get_runtime, runtimes
from sqakd_deploy.verification.constants import Difference, compare_constants
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.layers import LayersReport, compare_layers
from sqakd_deploy.verification.reference import Reference
from sqakd_deploy.verification.saturation import SaturationReport, saturation_of
from sqakd_deploy.verification.stages import ParityReport, Tolerance, compare

_DEFAULT_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        parity: the logits, stage by stage.
        constants: those of the file that are not the student's; None if the student's are not
            known.
        layers: every quantised tensor, where asked for and known.
        saturation: which layers can saturate on CPUs without VNNI.
    """

    parity: ParityReport
    constants: tuple[Difference, ...] | None
    layers: LayersReport | None
    saturation: SaturationReport

    @property
    def failures(self) -> list[str]:
        """What makes the file another function than its student, a line each.

        A constant that is not the student's is one even if no answer shows it.
        """
        return [*map(str, self.constants or ()), *self.parity.failures]

    def raise_for_failures(self) -> None:
        """Raise if the file is not its student.

        Raises:
            ParityError: with every failure.
        """
        if self.failures:
            raise ParityError("the file is not its student: " + "; ".join(self.failures))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        facts = asdict(self)
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
    others: Mapping[str, Runtime] | None = None,
) -> Verification:
    """Compare a file with a student's answers, constants and tensors, as far as these are known.

    Args:
        path: of an ONNX file.
        reference: the student's answers.
        tolerance: of the logits.
        layer_samples: images to compare quantised tensors on; 0 leaves them out.
        others: runtimes that take part if they can open the file; None takes all installed.

    Raises:
        ExportError: if the file cannot be read, or its runtime cannot run it.
        DataError: if tensors are asked for and the reference has none.
    """
    file = QdqFile(path)
    runtime = proving_runtime(file)
    others = runtimes() if others is None else others
    others = {name: other for name, other in others.items() if name != runtime.name}
    batches = [
        batch[i : i + (file.batch or len(batch))]
        for batch in reference.batches
        for i in range(0, len(batch), file.batch or len(batch))
    ]
    parity = compare(
        path, batches, reference.expected(), runtime, others=others, tolerance=tolerance
    )
    differences = None
    if reference.constants is not None:
        differences = tuple(compare_constants(reference.constants, file.constants()))
    layers = None
    if layer_samples:
        able = {name: other for name, other in others.items() if name not in parity.skipped}
        wrong = {difference.layer for difference in differences or ()}
        layers = _layers(file, reference, layer_samples, runtime, able, wrong)
    return Verification(parity, differences, layers, saturation_of(file))


def proving_runtime(file: QdqFile) -> Runtime:
    """The runtime of the target that a file was written for; ONNX Runtime where it says none."""
    known = file.target is not None and file.target in exporters()
    return get_runtime(get_exporter(file.target).runtime if known else _DEFAULT_RUNTIME)  # type: ignore[arg-type]


def _layers(
    file: QdqFile,
    reference: Reference,
    count: int,
    runtime: Runtime,
    others: Mapping[str, Runtime],
    wrong: set[str],
) -> LayersReport:
    tensors = reference.tensors
    if not tensors:
        raise DataError(
            "the reference has no tensors to compare layers with; save it with --layers, or "
            "verify against the run"
        )
    count = min(count, *(len(tensor.codes) for tensor in tensors.values()))
    first = {
        name: type(tensor)(tensor.codes[:count], tensor.scale, tensor.zero_point)
        for name, tensor in tensors.items()
    }
    images = reference.first_images(count)
    return compare_layers(file, images, first, runtime, others=others, wrong=wrong)

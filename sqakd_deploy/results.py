"""What a training run came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqakd_deploy.data import ImageData, ImageSplit
from sqakd_deploy.evaluate import Logits, accuracy, agreement, divergence, predict
from sqakd_deploy.lowering.exact import as_deployed
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.lowering.lowerable import without_form
from sqakd_deploy.parity import expected_size, float_size, information_size
from sqakd_deploy.quantization import count_quantizers, spec_of, weight_quantizers
from sqakd_deploy.runs import still_batches


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    A student without an integer form has no file: its sizes are those of its parameters, without
    scales.

    Attributes:
        run: the folder.
        images: training images.
        teacher_trained: the teacher was trained here, with labels.
        seconds: by part of the job.
        label: bits and method, for instance ``w4a4 lsq``.
        test_images: held-out images that the figures below are on.
        teacher_top1: percent, None without labels.
        student_top1: percent, None without labels.
        agreement: of student and teacher on the top-1 answer (percent).
        divergence: mean KL from teacher to student (nats).
        quantizers: how many quantizers there are, by bits.
        float_size: of the teacher's weights (bytes).
        file_size: expected of the exported file's weights, scales and biases (bytes).
        information_size: the same with each weight at its own bits (bytes).
    """

    run: Path
    images: int
    teacher_trained: bool
    seconds: dict[str, float]
    label: str
    test_images: int
    teacher_top1: float | None
    student_top1: float | None
    agreement: float
    divergence: float
    quantizers: dict[str, dict[int, int]]
    float_size: int
    file_size: int
    information_size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return asdict(self) | {"run": str(self.run)}


def score(student: nn.Module, teacher: nn.Module, data: ImageData) -> dict[str, Any]:
    """The figures of a :class:`TrainResult` that are measured on held-out images or counted.

    Args:
        student: trained.
        teacher: its teacher.
        data: the held-out part is used.
    """
    ours = predict(as_deployed(student), still_batches(data.test, data.preprocessing))
    theirs = predict(teacher, still_batches(data.test, data.preprocessing))
    spec = spec_of(student)
    methods = dict.fromkeys([spec.weights.method, spec.activations.method])
    return {
        "label": f"{spec.label} {'/'.join(methods)}",
        "test_images": len(data.test.images),
        "teacher_top1": _top1(theirs, data.test),
        "student_top1": _top1(ours, data.test),
        "agreement": agreement(ours, theirs),
        "divergence": divergence(ours, theirs),
        "quantizers": count_quantizers(student),
        **_sizes(student, teacher),
    }


def _sizes(student: nn.Module, teacher: nn.Module) -> dict[str, int]:
    if without_form(student) is not None:
        return _parameter_sizes(student, teacher)
    graph = lower(student)
    return {
        "float_size": float_size(graph),
        "file_size": expected_size(graph),
        "information_size": information_size(graph),
    }


def _parameter_sizes(student: nn.Module, teacher: nn.Module) -> dict[str, int]:
    """Sizes of what has no integer graph; a weight that several layers share counts once."""
    narrow: dict[Tensor, int] = {}
    for path, quantizer in weight_quantizers(student).items():
        layer, _, _ = path.rpartition(".weight_quant")
        narrow[student.get_parameter(f"{layer}.weight")] = quantizer.bits
    everything = sum(parameter.numel() for parameter in teacher.parameters())
    weights = sum(weight.numel() for weight in narrow)
    beside = 4 * (everything - weights)
    return {
        "float_size": 4 * everything,
        "file_size": weights + beside,
        "information_size": sum(w.numel() * bits for w, bits in narrow.items()) // 8 + beside,
    }


def _top1(logits: Logits, split: ImageSplit) -> float | None:
    return None if split.labels is None else accuracy(logits, split.labels)

"""The float model that a quantised one is measured against."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from sqakd_deploy.checkpoint import Run
from sqakd_deploy.exporting import Artifact, ExportOptions
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.quantization import quantize
from sqakd_deploy.runs import load_teacher
from sqakd_deploy.spec import QuantSpec

_FLOAT = QuantSpec(placement="paper", exclude=("*",), output_bits=None)
"""A student without a single quantizer."""


def export_float(model: nn.Module, shape: tuple[int, int, int], path: Path) -> Artifact:
    """Write a float model as ONNX, BatchNorm folded.

    It takes the way of the students, with nothing quantised: measured on ResNet-18 and
    MobileNet-V2 it runs as fast as what ``torch.onnx.export(dynamo=True)`` writes (within 3 %),
    needs no package more and is there in a second.

    Args:
        model: not changed.
        shape: of its images ``(C, H, W)``.
        path: of the file.

    Raises:
        ModelError: if the model cannot be traced, naming the operator.
        ExportError: if the file cannot be written.
    """
    graph = lower(quantize(model, _FLOAT, example=shape).eval())
    return get_exporter("onnxruntime").export(graph, path, ExportOptions())


def export_teacher(run: Run, path: Path) -> Artifact:
    """Write the float teacher of a run as ONNX.

    Raises:
        CheckpointError: if the folder is incomplete or damaged.
        ModelError: as :func:`export_float`.
        ExportError: as :func:`export_float`.
    """
    teacher, preprocessing = load_teacher(run)
    return export_float(teacher, (preprocessing.channels, *preprocessing.input_size), path)

"""The float model that a quantised one is measured against."""

from __future__ import annotations

from pathlib import Path

import onnx
from torch import nn

from sqakd_deploy.bench.inputs import InputShape, input_of
from sqakd_deploy.checkpoint import Run
from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.exporting import Artifact, ExportOptions
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.onnx_file import read_onnx
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


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_HINT = "name its own with --run, or the float model with --fp32"


def check_is_of(run: Run, stated: InputShape | None, path: Path) -> None:
    """Refuse a run whose student is another than the file's, by the spec in the file's metadata.

    Raises:
        CheckpointError: if the specs differ, or the file has none.
    """
    written = None if stated is None else stated.metadata.get("sqakd.spec")
    if written is None:
        raise CheckpointError(f"{path} does not say what it is the student of; {_HINT}")
    try:
        same = QuantSpec.model_validate_json(written) == run.config.quantization
    except ValueError:
        same = False
    if not same:
        raise _another(run, path, "its bits and methods")


def check_is_alike(run: Run, fp32: Path, stated: InputShape | None, path: Path) -> None:
    """Refuse a run whose teacher is another network than the file's, or of other images.

    Runs with the same settings have the same spec, whatever their networks. Layers keep their
    names in ONNX files; OpenVINO IR is not asked for them.

    Args:
        run: whose teacher it is.
        fp32: the teacher as a file.
        stated: the quantised file's input.
        path: of the quantised file.

    Raises:
        CheckpointError: if so.
    """
    teacher = input_of(fp32)
    if teacher is not None and stated is not None and not teacher.fits(stated):
        raise _another(run, path, "the size of its images")
    if path.suffix == fp32.suffix:
        nodes = read_onnx(fp32, weights=False).graph.node
        layers = {node.name for node in nodes if node.op_type in _LAYERS}
        if layers - _names(read_onnx(path, weights=False)):
            raise _another(run, path, "its layers")


def _names(model: onnx.ModelProto) -> set[str]:
    return {node.name for node in model.graph.node}


def _another(run: Run, path: Path, differs: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not the student of the newest run, {run.path}, by {differs}; {_HINT}"
    )

"""Opens a file in the form that it has."""

from __future__ import annotations

from pathlib import Path

from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.ir_file import IrFile
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.verification.qonnx_file import QonnxFile, is_quantizer


def read_file(path: Path) -> OnnxFile:
    """A file to be asked for its constants: OpenVINO IR by its name, QONNX if it has such a
    quantizer, else QDQ.

    Raises:
        ExportError: if it is none of these.
    """
    if path.suffix == ".xml" and path.is_file():
        return IrFile(path)
    model = read_onnx(path)
    form = QonnxFile if any(map(is_quantizer, model.graph.node)) else QdqFile
    return form(path, model)

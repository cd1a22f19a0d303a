"""ONNX files, read with one error for whatever is wrong with them."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from sqakd_deploy.errors import ExportError


def read_onnx(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read an ONNX file.

    Args:
        path: of the file.
        weights: read those that lie beside it, too.

    Raises:
        ExportError: if there is no such file, it is empty or no ONNX file, or its weights are
            missing.
    """
    if path.is_dir():
        raise ExportError(
            f"{path} is a folder; wanted an ONNX file, as sqakd-deploy export writes it of a run"
        )
    if not path.is_file():
        raise ExportError(f"there is no file {path}; sqakd-deploy export writes one")
    try:
        model = onnx.load(path, load_external_data=weights)
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{path} is no ONNX file, or damaged: {error}") from error
    if not model.HasField("graph"):  # no bytes at all are a message without fields
        raise ExportError(f"{path} is empty, or no ONNX file")
    return model

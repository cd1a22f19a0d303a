"""Models into files: checked first, and there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from sqakd_deploy.errors import ExportError
from sqakd_deploy.files import replacing


def save_checked(model: ir.Model, path: Path) -> int:
    """Write a model that passes onnx's checker and shape inference.

    Args:
        model: the model.
        path: where to; a file that is there is replaced only by a complete new one.

    Returns:
        Bytes written.

    Raises:
        ExportError: if the model is not valid ONNX, or the file cannot be written.
    """
    proto = _lean(ir.to_proto(model))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: the model is not valid ONNX: {error}") from error
    content = proto.SerializeToString()
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    return len(content)


def _lean(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without the types of initializers, which these say themselves: 40 bytes for each."""
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.value_info if value.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(values)
    return proto

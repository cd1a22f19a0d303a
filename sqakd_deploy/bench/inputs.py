"""What an ONNX file wants to be given, and which bits it says it has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from sqakd_deploy.errors import ModelError
from sqakd_deploy.exporting import PROFILE_KEY
from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.pixels import INPUT_KEY

IR = ".xml"  # the only other kind of file that a runtime here opens


@dataclass(frozen=True)
class InputShape:
    """A file's input, and what its metadata say.

    Attributes:
        shape: ``(N, C, H, W)``, whatever its layout, None where an extent is dynamic.
        bits: of weights and activations, None if the file does not say.
        metadata: by key.
        pixels: whether it takes raw uint8 pixels.
    """

    shape: tuple[int | None, ...]
    bits: tuple[int, int] | None
    metadata: dict[str, str]
    pixels: bool = False

    @property
    def profile(self) -> str | None:
        """What to say of a file whose own runtime is not among those measured; None elsewhere."""
        try:
            runtime = json.loads(self.metadata.get(PROFILE_KEY, "{}"))["runtime"]
        except (ValueError, KeyError, TypeError):
            return None
        return f"the file is for {runtime}, which it was not run in: no figure here is {runtime}'s"


def onnx_input(path: Path) -> InputShape | None:
    """Read an ONNX file's input; None for a file of another kind.

    Raises:
        ExportError: if there is no such file, or it is no ONNX file.
        ModelError: if it has several inputs.
    """
    if path.suffix == IR and path.is_file():
        return None
    model = read_onnx(path, weights=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if not model.graph.node or len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise ModelError(f"{path}: wanted an ONNX model with one input, got {names}")
    dims = inputs[0].type.tensor_type.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    pixels = inputs[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    if _layout(metadata) == "NHWC" and len(shape) == 4:
        shape = (shape[0], shape[3], shape[1], shape[2])
    return InputShape(shape, _bits(metadata), metadata, pixels)


def _layout(metadata: dict[str, str]) -> str | None:
    try:
        return str(json.loads(metadata.get(INPUT_KEY, "{}"))["layout"])
    except (ValueError, KeyError, TypeError):
        return None


def _bits(metadata: dict[str, str]) -> tuple[int, int] | None:
    if "sqakd.spec" not in metadata:
        return None
    try:
        spec = json.loads(metadata["sqakd.spec"])
        return int(spec["weights"]["bits"]), int(spec["activations"]["bits"])
    except (ValueError, KeyError, TypeError):
        return None  # another program's, or another version's

"""What a file wants to be given, and which bits it says it has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import onnx

from sqakd_deploy.errors import ModelError, SpecError
from sqakd_deploy.exporting import PROFILE_KEY
from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.pixels import INPUT_KEY, PREPROCESSING_KEY
from sqakd_deploy.spec import SPEC_KEY, QuantSpec

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

    def fits(self, other: InputShape) -> bool:
        """Whether both take the same images; what either leaves open fits."""
        one, two = self.shape[1:], other.shape[1:]
        pairs = zip(one, two, strict=False)
        return len(one) == len(two) and all(None in pair or len({*pair}) == 1 for pair in pairs)

    @property
    def label(self) -> str | None:
        """What its student's spec is called, as ``w4a4-mixed``; None if the file does not say."""
        try:
            return QuantSpec.model_validate_json(self.metadata.get(SPEC_KEY, "")).label
        except (ValueError, SpecError):  # another version's
            return None if self.bits is None else "w{}a{}".format(*self.bits)

    @property
    def profile(self) -> str | None:
        """What to say of a file whose own runtime is not among those measured; None elsewhere."""
        try:
            runtime = json.loads(self.metadata.get(PROFILE_KEY, "{}"))["runtime"]
        except (ValueError, KeyError, TypeError):
            return None
        return f"the file is for {runtime}, which it was not run in: no figure here is {runtime}'s"


def input_of(path: Path) -> InputShape | None:
    """Read an ONNX file's input, or that of OpenVINO IR; None if only a session can tell it.

    Raises:
        ExportError: if there is no such file, or it is no ONNX file.
        ModelError: if it has several inputs, or one that is not of images.
    """
    return _ir_input(path) if path.suffix == IR and path.is_file() else onnx_input(path)


def metadata_of(path: Path) -> dict[str, str]:
    """What a file says of itself, by key.

    Raises:
        ExportError: as :func:`input_of`.
        ModelError: as :func:`input_of`.
    """
    found = input_of(path)
    return {} if found is None else found.metadata


def onnx_input(path: Path) -> InputShape:
    """Read an ONNX file's input.

    Raises:
        ExportError: if there is no such file, or it is no ONNX file.
        ModelError: if it has several inputs, or one that is not of images.
    """
    model = read_onnx(path, weights=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if not model.graph.node or len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise ModelError(f"{path}: wanted an ONNX model with one input, got {names}")
    dims = inputs[0].type.tensor_type.shape.dim
    if len(dims) < 2:
        raise ModelError(
            f"{path}: wanted an input (N, C, H, W), but {inputs[0].name!r} states {len(dims)} axes"
        )
    shape = tuple(d.dim_value if d.dim_value > 0 else None for d in dims)  # some write −1
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    pixels = inputs[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    return _input(shape, metadata, pixels)


def _ir_input(path: Path) -> InputShape | None:
    """An IR's input, read from its XML; of one that is damaged OpenVINO says what is wrong."""
    try:
        net = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError):
        return None
    inputs = net.findall("layers/layer[@type='Parameter']/data")
    if len(inputs) != 1:
        return None
    extents = inputs[0].get("shape", "").split(",")
    shape = tuple(int(extent) if extent.isdecimal() else None for extent in extents)
    own = PREPROCESSING_KEY.partition(".")[0]
    metadata = {f"{own}.{e.tag}": e.get("value", "") for e in net.findall(f"rt_info/{own}/*")}
    return _input(shape, metadata, inputs[0].get("element_type") == "u8")


def _input(shape: tuple[int | None, ...], metadata: dict[str, str], pixels: bool) -> InputShape:
    if _layout(metadata) == "NHWC" and len(shape) == 4:
        shape = (shape[0], shape[3], shape[1], shape[2])
    return InputShape(shape, _bits(metadata), metadata, pixels)


def _layout(metadata: dict[str, str]) -> str | None:
    try:
        return str(json.loads(metadata.get(INPUT_KEY, "{}"))["layout"])
    except (ValueError, KeyError, TypeError):
        return None


def _bits(metadata: dict[str, str]) -> tuple[int, int] | None:
    if SPEC_KEY not in metadata:
        return None
    try:
        spec = json.loads(metadata[SPEC_KEY])
        return int(spec["weights"]["bits"]), int(spec["activations"]["bits"])
    except (ValueError, KeyError, TypeError):
        return None  # another program's, or another version's

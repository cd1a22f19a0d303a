"""What needs the package openvino: sessions, and writing IR."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray

from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import Coverage
from sqakd_deploy.files import replacing
from sqakd_deploy.pixels import INPUT_KEY, PREPROCESSING_KEY
from sqakd_exporters.feeding import feed
from sqakd_exporters.openvino_coverage import measure

_EXACT: Mapping[str, Any] = {
    # Float parts run in bfloat16 on CPUs that have it (rule O7), and layers with integer weights
    # and float inputs quantise those on the fly (rule O6): neither is the student.
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "PERFORMANCE_HINT": "LATENCY",
}
_AS_WRITTEN = {"LP_TRANSFORMS_MODE": "NO"}


class OpenVinoSession:
    """An opened file of one input and one output.

    Attributes:
        path: the file.
        input_shape: ``(N, C, H, W)``, None where an extent is dynamic.
    """

    def __init__(self, path: Path, *, optimize: bool, threads: int | None) -> None:
        self.path = path
        self._optimize = optimize
        self._model = _read(path)
        ends = len(self._model.inputs), len(self._model.outputs)
        if ends != (1, 1):
            raise ExportError(
                f"{path}: wanted one input and one output, got {ends[0]} and {ends[1]}"
            )
        shape = self._model.inputs[0].partial_shape
        self.input_shape = tuple(None if d.is_dynamic else d.get_length() for d in shape)
        self._compiled = _compile(self._model, path, optimize, threads)
        self._request = self._compiled.create_infer_request()
        takes_pixels = self._model.inputs[0].element_type == openvino.Type.u8
        self._metadata = _metadata(self._model, path) if takes_pixels else None

    def run(self, images: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits ``(N, K)`` of preprocessed images ``(N, C, H, W)``, however many.

        Raises:
            ExportError: as :func:`~sqakd_exporters.feeding.feed`, or if OpenVINO fails.
        """
        return feed(
            self._run, images, shape=self.input_shape, pixels=self._metadata, path=self.path
        )

    def _run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        try:
            results = self._request.infer([images], share_inputs=True)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot run {self.path}: {_first_line(error)}") from error
        logits: NDArray[np.float32] = results[0].copy()  # the request's own memory
        return logits

    def coverage(self) -> Coverage:
        """Which layers run in integers, read from the graph that OpenVINO executes."""
        return measure(self._model, self._compiled.get_runtime_model(), fusing=self._optimize)


def save_ir(model: onnx.ModelProto, path: Path, weights: Path) -> int:
    """Write a model as OpenVINO IR.

    Args:
        model: valid ONNX.
        path: of the ``.xml``; its metadata go into the IR's runtime information.
        weights: of the ``.bin``, which is there before the ``.xml`` is.

    Returns:
        Bytes of both.

    Raises:
        ExportError: if OpenVINO cannot convert the model, or a file cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "model.onnx", Path(folder) / "model.xml"
        source.write_bytes(model.SerializeToString())
        converted = _read(source, path)
        for prop in model.metadata_props:
            converted.set_rt_info(prop.value, prop.key.split("."))
        # By default save_model stores float constants, scales among them, in 16 bits (rule O8).
        openvino.save_model(converted, made, compress_to_fp16=False)
        try:
            parts = {weights: made.with_suffix(".bin").read_bytes(), path: made.read_bytes()}
            for target, content in parts.items():
                with replacing(target) as temporary:
                    temporary.write_bytes(content)
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror}") from error
    return sum(len(content) for content in parts.values())


def _metadata(model: openvino.Model, path: Path) -> dict[str, str]:
    """What travels in a file; OpenVINO drops ONNX's metadata, and keeps those of IR."""
    if path.suffix == ".xml":
        keys = (PREPROCESSING_KEY, INPUT_KEY)
        return {key: model.get_rt_info(key.split(".")).astype(str) for key in keys}
    properties = onnx.load(path, load_external_data=False).metadata_props
    return {entry.key: entry.value for entry in properties}


@cache
def _core() -> openvino.Core:
    """One for the process, never closed.

    Its CPU plugin lends the thread that makes it a stack for signals, and takes that back when it
    goes. With several of them, closed in another order, signals would run on a stack that is gone.
    """
    return openvino.Core()


def _read(path: Path, called: Path | None = None) -> openvino.Model:
    """A model as read; errors call the file what a person called it."""
    try:
        return _core().read_model(path)
    except Exception as error:  # its frontends raise classes of their own, not all exported
        name = path if called is None else called
        raise ExportError(f"OpenVINO cannot load {name}: {_first_line(error)}") from error


def _compile(
    model: openvino.Model, path: Path, optimize: bool, threads: int | None
) -> openvino.CompiledModel:
    config = {**_EXACT, **({} if optimize else _AS_WRITTEN)}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    try:
        return _core().compile_model(model, "CPU", config)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot compile {path}: {_first_line(error)}") from error


_PLACES = ("Exception from", "Check '")
_OF_REPORT = ("FrontEnd API failed", "Model wasn't", "-- ", "While validating node")


def _first_line(error: Exception) -> str:
    """What says something; OpenVINO's messages begin with places in its source.

    Its report of operators that it cannot convert names each, and says why two lines further on.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_PLACES)]
    if told and told[0].startswith(_OF_REPORT):
        told = [" ".join([line for line in told if not line.startswith(_OF_REPORT)][:2]), *told]
    return (told or lines or [type(error).__name__])[0]

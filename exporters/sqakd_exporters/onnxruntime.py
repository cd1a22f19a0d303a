"""ONNX Runtime on the CPU: the exporter, and the runtime that proves its files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from sqakd_deploy import graph as g
from sqakd_deploy.cpu import this_cpu
from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import Artifact, Coverage, ExportOptions, PlacementRules
from sqakd_deploy.graph import IntegerGraph
from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.spec import QuantSpec
from sqakd_exporters.coverage import measure
from sqakd_exporters.feeding import feed
from sqakd_exporters.forms import kept_in_float
from sqakd_exporters.joining import with_codes_joined
from sqakd_exporters.packing import PACKED_BITS
from sqakd_exporters.pooling import with_padding_apart
from sqakd_exporters.qdq import EMITTERS, OPSETS, build_model, conv, linear
from sqakd_exporters.requantising import quantize, with_levels_at_the_top
from sqakd_exporters.saving import save_checked
from sqakd_exporters.stems import with_fast_stems
from sqakd_exporters.unsigned import as_unsigned
from sqakd_exporters.writer import Emitters

_ERRORS_ONLY, _FATAL_ONLY = 3, 4  # ONNX Runtime's severity scale

# Where the CPU has no VNNI, the kernels for uint8 by int8 saturate (rule 19): with this, layers
# whose weights could make them do so get uint8 weights and kernels that cannot. ONNX Runtime does
# the same where the CPU has AVX512-VNNI and not AVX-VNNI, and is 3.5 times slower for nothing.
_EXACT = "session.x64quantprecision"
_SHARED = "Attempt to replace"  # what it says of constants that two such layers share

# From opset 21 on ONNX Runtime states the type of the quantizers that it moves, and fails at that
# where it then makes int8 activations uint8, unless it is told to leave them.
_SIGNED = ("session.qdqisint8allowed", "1")
_MISTYPED = "output_dtype INT8 does not match"

# Threads that spin until there is more to do take as much CPU time as a small proof itself. Whoever
# says how many threads they want, as a benchmark does, gets them as they are.
_PATIENT = ("session.intra_op.allow_spinning", "0")


class OnnxRuntimeExporter:
    """QDQ ONNX in the forms that ONNX Runtime's CPU provider fuses into integer kernels."""

    name = "onnxruntime"
    summary = "QDQ ONNX for ONNX Runtime on CPUs: uint8 activations, int8 weights, all layers fused"
    runtime = "onnxruntime"
    placement = PlacementRules()
    packs = PACKED_BITS
    suffixes = (".onnx",)
    opsets = OPSETS

    def check(self, spec: QuantSpec) -> None:
        """Every spec that validates can run: 1 to 8 bits, any registered method."""

    def export(self, graph: IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        """Write the file, checked by onnx, whole or not at all.

        Raises:
            ExportError: if a node cannot be written, naming it; if the model does not pass onnx's
                checker; if the file cannot be written.
        """
        graph = with_padding_apart(with_codes_joined(as_unsigned(graph)))
        graph = with_fast_stems(with_levels_at_the_top(graph))
        size = save_checked(build_model(graph, options, packs=self.packs, emitters=_EMITTERS), path)
        return Artifact(path, self.name, size)


_EMITTERS: Emitters = MappingProxyType(
    {
        **EMITTERS,
        g.Conv: kept_in_float(conv),
        g.Linear: kept_in_float(linear),
        g.Quantize: quantize,
    }
)


class OnnxRuntime:
    """Opens ONNX files with ONNX Runtime's CPU provider."""

    name = "onnxruntime"
    exact_sums = True

    def open(
        self, path: Path, *, optimize: bool = True, threads: int | None = None
    ) -> OnnxRuntimeSession:
        """Load a file.

        Args:
            path: the file.
            optimize: all of ONNX Runtime's graph optimisations, or none.
            threads: intra-operator threads; None takes ONNX Runtime's default.

        Raises:
            ExportError: if ONNX Runtime refuses the file.
        """
        return OnnxRuntimeSession(path, optimize=optimize, threads=threads)


class OnnxRuntimeSession:
    """An opened file of one input and one output."""

    def __init__(self, path: Path, *, optimize: bool, threads: int | None) -> None:
        self.path = path
        self._optimize = optimize
        self._session = _open(path, partial(_options, optimize, threads))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if (len(inputs), len(outputs)) != (1, 1):
            raise ExportError(
                f"{path}: wanted one input and one output, got {len(inputs)} and {len(outputs)}"
            )
        self._input, self._output = inputs[0], outputs[0]

    def run(self, images: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits ``(N, K)`` of preprocessed images ``(N, C, H, W)``, however many.

        Raises:
            ExportError: as :func:`~sqakd_exporters.feeding.feed`, or if the runtime fails.
        """
        takes_pixels = self._input.type == "tensor(uint8)"
        metadata = self._session.get_modelmeta().custom_metadata_map if takes_pixels else None
        return feed(self._run, images, shape=self._input.shape, pixels=metadata, path=self.path)

    def _run(self, images: NDArray[Any]) -> NDArray[np.float32]:
        feed = {self._input.name: images}
        try:
            (logits,) = self._session.run([self._output.name], feed)
        except Exception as error:  # see _open
            raise ExportError(f"ONNX Runtime cannot run {self.path}: {error}") from error
        result: NDArray[np.float32] = logits
        return result

    def coverage(self) -> Coverage:
        """Which layers run in integers, read from the graph that ONNX Runtime made of the file."""
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"

            def options() -> ort.SessionOptions:
                made = _options(self._optimize, threads=1)
                made.optimized_model_filepath = str(optimised)
                return made

            _open(self.path, options)
            made = read_onnx(optimised, beside=self.path)
            return measure(read_onnx(self.path), made, fusing=self._optimize)


def _options(optimize: bool, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    if threads is None:
        options.add_session_config_entry(*_PATIENT)
    else:
        options.intra_op_num_threads = threads
    return options


def _open(path: Path, make: Callable[[], ort.SessionOptions]) -> ort.InferenceSession:
    """Open a file so that it sums exactly; others' whose layers share zero-points as they are.

    Activations of int8 stay what they are where ONNX Runtime fails at making them uint8.
    """
    try:
        return _session(path, _exact(make))
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        problem = error
    try:
        if _SHARED in str(problem):
            return _session(path, make())
        if _MISTYPED in str(problem):
            return _session(path, _exact(make, _SIGNED))
    except Exception as error:
        problem = error
    raise ExportError(f"ONNX Runtime cannot load {path}: {problem}") from problem


def _exact(make: Callable[[], ort.SessionOptions], *more: tuple[str, str]) -> ort.SessionOptions:
    """Options for exact sums, and more settings; what is an error is raised, not logged."""
    options = make()
    options.log_severity_level = _FATAL_ONLY
    exact = (_EXACT, "0" if this_cpu() == "vnni" else "1")
    for setting in (exact, *more):
        options.add_session_config_entry(*setting)
    return options


def _session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

"""What needs the package qonnx: sessions of its executor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes

from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import Coverage, FloatFallback
from sqakd_deploy.onnx_file import read_onnx
from sqakd_exporters.feeding import feed
from sqakd_exporters.reasons import excluded_by

_QUANTIZERS = ("IntQuant", "Quant", "BipolarQuant")
_MOVING = ("Concat", "Flatten", "Gather", "MaxPool", "Mul", "Pad", "Reshape", "Slice", "Transpose")
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_REAL = (
    "BatchNormalization",
    "Elu",
    "Gelu",
    "HardSigmoid",
    "LayerNormalization",
    "LeakyRelu",
    "LogSoftmax",
    "PRelu",
    "Reciprocal",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Sqrt",
    "Tanh",
)
_LAYERS = (
    *_WITH_WEIGHTS,
    *_REAL,
    "Add",
    "AveragePool",
    "Concat",
    "Div",
    "GlobalAveragePool",
    "MaxPool",
    "Mul",
    "ReduceL2",
    "ReduceMean",
    "ReduceSumSquare",
    "Resize",
)


class QonnxSession:
    """An opened file of one input and one output.

    Attributes:
        path: the file.
        input_shape: ``(N, C, H, W)``, None where an extent is dynamic.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = read_onnx(path)
        if not any(node.op_type in _QUANTIZERS for node in self._model.graph.node):
            raise ExportError(f"{path} is no QONNX file: it has no Quant node")
        ends = len(self._model.graph.input), len(self._model.graph.output)
        if ends != (1, 1):
            raise ExportError(
                f"{path}: wanted one input and one output, got {ends[0]} and {ends[1]}"
            )
        extents = self._model.graph.input[0].type.tensor_type.shape.dim
        self.input_shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in extents)
        self._ready: dict[int, ModelWrapper] = {}

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``(N, K)`` of preprocessed images ``(N, C, H, W)``, however many.

        Raises:
            ExportError: as :func:`~sqakd_exporters.feeding.feed`; if the executor fails.
        """
        return feed(self._run, images, shape=self.input_shape, pixels=None, path=self.path)

    def read(self, images: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
        """Logits, and values of the file behind them, a row ``(K + …)`` for each image.

        Raises:
            ExportError: as :meth:`run`.
        """
        run = partial(self._run, names=names)
        return feed(run, images, shape=self.input_shape, pixels=None, path=self.path)

    def _run(self, images: NDArray[Any], names: Sequence[str] = ()) -> NDArray[np.float32]:
        try:
            model = self._sized(len(images))
            results = execute_onnx(model, {model.graph.input[0].name: images}, bool(names))
        except Exception as error:  # the executor's, and those of ONNX Runtime, which it calls
            raise ExportError(f"qonnx's executor cannot run {self.path}: {error}") from error
        logits: NDArray[np.float32] = results[model.graph.output[0].name]
        rows = [results[name].reshape(len(images), -1) for name in names]
        return np.concatenate([logits, *rows], axis=1) if rows else logits

    def _sized(self, count: int) -> ModelWrapper:
        """The model for so many images: the executor wants every shape as a number."""
        if count not in self._ready:
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
            for value in (model.graph.input[0], model.graph.output[0]):
                value.type.tensor_type.shape.dim[0].dim_value = count
            self._ready[count] = ModelWrapper(model).transform(InferShapes())
        return self._ready[count]

    def coverage(self) -> Coverage:
        """Which layers have integers of a stated width on every input."""
        producers = {name: node for node in self._model.graph.node for name in node.output}
        constants = {tensor.name for tensor in self._model.graph.initializer}
        metadata = {entry.key: entry.value for entry in self._model.metadata_props}
        integer: Counter[str] = Counter()
        total: Counter[str] = Counter()
        fallbacks = []
        for node in self._model.graph.node:
            kind = node.op_type
            if kind not in _LAYERS or any(name in constants for name in _factors(node)):
                continue
            total[kind] += 1
            reason = _reason(node, producers)
            if reason is not None and node.op_type not in _REAL:  # those have no choice
                reason = excluded_by(metadata, node.name) or reason
            if reason is None:
                integer[kind] += 1
            else:
                fallbacks.append(FloatFallback(node.name, kind, reason))
        return Coverage(dict(integer), dict(total), tuple(fallbacks), packed=None)


def _factors(node: NodeProto) -> list[str]:
    """What a product or quotient is of: a layer only if both are computed, a scale otherwise."""
    return list(node.input) if node.op_type in ("Mul", "Div") else []


def _reason(node: NodeProto, producers: dict[str, NodeProto]) -> str | None:
    """Why a layer is none of integers; None if it is one."""
    if node.op_type in _REAL:
        return f"{node.op_type} has no integer form in QONNX"
    missing = _missing(node, producers)
    return None if missing is None else f"{missing!r} has no Quant node"


def _missing(node: NodeProto, producers: dict[str, NodeProto]) -> str | None:
    """The first input of a layer, biases apart, that no quantizer wrote; None if all have one."""
    count = 2 if node.op_type in (*_WITH_WEIGHTS, "Add", "Mul") else 1
    names = node.input if node.op_type == "Concat" else node.input[:count]
    return next((name for name in names if not _quantised(name, producers)), None)


def _quantised(name: str, producers: dict[str, NodeProto]) -> bool:
    node = producers.get(name)
    if node is None:
        return False
    if node.op_type in _QUANTIZERS:
        return True
    return node.op_type in _MOVING and _quantised(node.input[0], producers)

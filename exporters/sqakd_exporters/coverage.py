"""Which layers of a QDQ file a runtime runs in integers, and why the others do not.

The counts come from the graph that the runtime made of the file; the reasons from the file itself,
by the rules of ``docs/runtime-rules.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from sqakd_deploy.exporting import Coverage, FloatFallback

FLOAT_LAYERS = {
    "Conv": "Conv",
    "FusedConv": "Conv",
    "NhwcFusedConv": "Conv",
    "ConvTranspose": "ConvTranspose",
    "Gemm": "Gemm",
    "FusedGemm": "Gemm",
    "MatMul": "MatMul",
    "FusedMatMul": "MatMul",
    "Add": "Add",
    "Concat": "Concat",
    "AveragePool": "AveragePool",
    "GlobalAveragePool": "GlobalAveragePool",
    "MaxPool": "MaxPool",
}
"""Operators that count, by what ONNX Runtime may call them when they stay in float."""

INTEGER_LAYERS = {
    "QLinearConv": "Conv",
    "ConvInteger": "Conv",
    "QGemm": "Gemm",
    "QLinearMatMul": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "QLinearAdd": "Add",
    "QLinearConcat": "Concat",
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "NhwcMaxPool": "MaxPool",
}
"""Operators with integer kernels."""

_EITHER = {"Concat", "MaxPool"}  # run in whatever type they are given


def measure(written: onnx.ModelProto, optimised: onnx.ModelProto) -> Coverage:
    """Compare a file with what a runtime made of it.

    Args:
        written: the file.
        optimised: the runtime's graph.
    """
    graph = _Reader(written)
    made = _Reader(optimised)
    integer: Counter[str] = Counter()
    total: Counter[str] = Counter()
    fallbacks = []
    for node in optimised.graph.node:
        if node.op_type in INTEGER_LAYERS or made.moves_integers(node):
            layer = INTEGER_LAYERS.get(node.op_type, node.op_type)
            integer[layer] += 1
            total[layer] += 1
        elif node.op_type in FLOAT_LAYERS and not made.counts_shapes(node):
            total[FLOAT_LAYERS[node.op_type]] += 1
            reason = graph.reason(node)
            fallbacks.append(FloatFallback(node.name, FLOAT_LAYERS[node.op_type], reason))
    return Coverage(dict(integer), dict(total), tuple(fallbacks))


class _Reader:
    """A model's nodes by what they read and write."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.nodes = {node.name: node for node in model.graph.node}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        inferred = onnx.shape_inference.infer_shapes(model)
        self.types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
        self.types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    def moves_integers(self, node: NodeProto) -> bool:
        """Whether an operator of either kind is fed integers."""
        return node.op_type in _EITHER and self._is_integer(node.input[0], set())

    def _is_integer(self, name: str, seen: set[str]) -> bool:
        small = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        if name in self.types:
            return self.types[name] in small
        producer = self.producers.get(name)
        if producer is None or name in seen:
            return False
        seen.add(name)
        if producer.op_type == "QuantizeLinear" or producer.op_type.startswith("QLinear"):
            return True
        passes = ("Clip", "MaxPool", "NhwcMaxPool", "Transpose", "Slice", "Pad", "Reshape")
        return producer.op_type in (*passes, "Flatten", "Concat") and self._is_integer(
            producer.input[0], seen
        )

    def counts_shapes(self, node: NodeProto) -> bool:
        """Whether an Add or Concat works on sizes, not on data."""
        return any(self.types.get(name) == onnx.TensorProto.INT64 for name in node.input)

    # -- reasons -----------------------------------------------------------------------------

    def reason(self, optimised: NodeProto) -> str:
        """Why the runtime left a layer in float."""
        node = self.nodes.get(optimised.name) or self._same_output(optimised)
        if node is None:
            return "the runtime put it there"
        checks: tuple[Callable[[NodeProto], str | None], ...] = (
            self._inputs,
            self._weights,
            self._output,
            self._bias,
        )
        found = [problem for check in checks if (problem := check(node))]
        return "; ".join(found) or "the runtime did not fuse it, though it follows the rules"

    def _same_output(self, optimised: NodeProto) -> NodeProto | None:
        return next((self.producers[n] for n in optimised.output if n in self.producers), None)

    def _from(self, name: str) -> NodeProto | None:
        producer = self.producers.get(name)
        return producer if producer and producer.op_type == "DequantizeLinear" else None

    def _data_inputs(self, node: NodeProto) -> list[str]:
        joins = node.op_type in ("Add", "Concat", "MatMul")
        return list(node.input) if joins else [node.input[0]]

    def _inputs(self, node: NodeProto) -> str | None:
        bare = [name for name in self._data_inputs(node) if self._from(name) is None]
        if bare:
            return f"input {bare[0]!r} is not quantised (rules 1, 8)"
        for name in self._data_inputs(node):
            quantizer = self._from(name)
            if quantizer is not None and self._wide(quantizer):
                return f"input {name!r} is neither int8 nor uint8 (rule 15)"
        return None

    def _wide(self, quantizer: NodeProto) -> bool:
        kind = self.types.get(quantizer.input[2]) if len(quantizer.input) > 2 else None
        return kind not in (None, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)

    def _weights(self, node: NodeProto) -> str | None:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or len(node.input) < 2:
            return None
        if node.op_type == "ConvTranspose":
            return "the runtime has no integer ConvTranspose (rule 10)"
        quantizer = self._from(node.input[1])
        if quantizer is None:
            return "weights are float (rule 1)"
        if self.types.get(quantizer.input[0]) not in (
            onnx.TensorProto.INT8,
            onnx.TensorProto.UINT8,
        ):
            return "weights are not 8-bit integers when dequantised (rule 16)"
        return None

    def _output(self, node: NodeProto) -> str | None:
        name = node.output[0]
        readers = self.readers.get(name, [])
        activation = None
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip", "LeakyRelu"):
            activation = readers[0]
            name = activation.output[0]
            readers = self.readers.get(name, [])
        if len(readers) != 1 or name in self.outputs:
            return f"output {name!r} has {len(readers)} readers, not one quantizer (rule 7)"
        if readers[0].op_type != "QuantizeLinear":
            return f"output {name!r} is not quantised but read by {readers[0].op_type} (rule 1)"
        return self._after_activation(activation, readers[0]) or self._shapes(readers[0])

    def _after_activation(self, activation: NodeProto | None, quantizer: NodeProto) -> str | None:
        zero = self._value(quantizer.input[2]) if len(quantizer.input) > 2 else np.uint8(0)
        if activation is None or zero is None:
            return None
        lowest = np.iinfo(zero.dtype).min if zero.dtype.kind in "iu" else 0
        if activation.op_type == "Relu" and np.any(zero != lowest):
            return f"ReLU before a quantizer with zero-point {zero}, not {lowest} (rule 2)"
        if activation.op_type == "Clip":
            return "Clip before a quantizer whose range is wider than it (rule 3)"
        return None

    def _shapes(self, quantizer: NodeProto) -> str | None:
        scale = self._value(quantizer.input[1])
        if scale is not None and scale.ndim != 0:
            return f"the output's scale has shape {scale.shape}, not () (rule 4)"
        return None

    def _bias(self, node: NodeProto) -> str | None:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            return None
        data, weight, bias = (self._from(name) for name in node.input[:3])
        if bias is None:
            return None if data is None or weight is None else "bias is float (rule 12)"
        if data is None or weight is None:
            return None
        scales = [self._value(part.input[1]) for part in (data, weight, bias)]
        if any(scale is None for scale in scales):
            return None
        expected = np.asarray(scales[0], np.float32) * np.asarray(scales[1], np.float32)
        # the runtime compares to within a relative 1e-3
        if not np.allclose(np.asarray(scales[2]), expected, rtol=1e-3, atol=0):
            return "bias scale is not input scale × weight scale (rule 12)"
        return None

    def _value(self, name: str) -> np.ndarray | None:
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

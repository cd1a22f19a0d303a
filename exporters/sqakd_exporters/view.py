"""An ONNX graph to be asked questions: who writes a value, who reads it, what a constant holds."""

from __future__ import annotations

from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

EIGHT_BIT = (TensorProto.INT8, TensorProto.UINT8)
_SIZES = ("Shape", "Size")
_DEFAULTS = 4  # IR version from which on initializers among the inputs are no constants
_QGEMM_OUTPUT = 7  # position of the scale of its output


class GraphView:
    """A model's top-level graph, indexed.

    Args:
        model: not changed; nodes of any domain.

    Attributes:
        nodes: in the model's order.
        producers: node by the name of each output.
        outputs: names of the graph's outputs.
        metadata: texts by key.
        changeable: initializers that are inputs of the graph, too: defaults, that callers may
            change.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.outputs = {value.name for value in model.graph.output}
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        inputs = {value.name for value in model.graph.input}
        self.changeable = inputs & self._constants.keys()
        if model.ir_version < _DEFAULTS:
            self.changeable = set()
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        known = (*inferred.input, *inferred.value_info, *inferred.output)
        self._types = {value.name: value.type.tensor_type.elem_type for value in known}
        self._types |= {name: tensor.data_type for name, tensor in self._constants.items()}
        self._data = self._reached([value.name for value in model.graph.input])

    def _reached(self, inputs: list[str]) -> set[str]:
        """Values computed from the inputs' data; sizes and restored constants are none."""
        found = {name for name in inputs if name not in self._constants}
        for node in self.nodes:  # ONNX keeps nodes in topological order
            if node.op_type not in _SIZES and found.intersection(node.input):
                found.update(node.output)
        return found

    def carries_data(self, node: NodeProto) -> bool:
        """Whether a node works on what comes from the graph's input."""
        return bool(self._data.intersection(node.input))

    def carried(self, node: NodeProto) -> list[str]:
        """Those inputs of a node that come from the graph's input."""
        return [name for name in node.input if name in self._data]

    def constant_nodes(self) -> list[NodeProto]:
        """Nodes that compute from initializers alone, in the model's order."""
        known, found = set(self._constants), []
        for node in self.nodes:
            names = [name for name in node.input if name]
            if names and known.issuperset(names):
                known.update(node.output)
                found.append(node)
        return found

    def readers(self, name: str) -> list[NodeProto]:
        """Nodes that read a value; one that reads it twice counts twice."""
        return self._readers.get(name, [])

    def called(self, name: str) -> str:
        """What people know a value by: its node's name where it has but a number itself."""
        producer = self.producers.get(name)
        return producer.name if name[:1].isdigit() and producer and producer.name else name

    def type_of(self, name: str) -> int | None:
        """Element type of a value, None if it is unknown."""
        return self._types.get(name) or None

    def constant(self, name: str) -> NDArray[Any] | None:
        """What an initializer holds, None for any other value."""
        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def dequantizer(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that writes a value, if one does."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def is_integer(self, name: str) -> bool:
        """Whether a value holds 8-bit integers, as far as can be told.

        Shape inference stops at a runtime's own operators; their outputs are told by the operator,
        and operators that only move data by what they move.
        """
        known = self.type_of(name)
        producer = self.producers.get(name)
        if known is not None or producer is None:
            return known in EIGHT_BIT
        if producer.op_type == "QuantizeLinear" or producer.op_type.startswith("QLinear"):
            return True
        if producer.op_type == "QGemm":  # gives reals where it has no scale of its output
            return any(producer.input[_QGEMM_OUTPUT:])
        return producer.op_type in _MOVING and self.is_integer(producer.input[0])


_MOVING = (
    "Clip",
    "Concat",
    "Flatten",
    "Gather",
    "MaxPool",
    "NhwcMaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((a.i for a in node.attribute if a.name == name), default)


def text(node: NodeProto, name: str) -> str:
    """A text attribute of a node; empty where it has none."""
    return next((a.s.decode() for a in node.attribute if a.name == name), "")

"""An ONNX file as its layers' constants and quantised tensors, in whatever form it has them.

Layers are found by the names of their nodes, which every exporter keeps. Constants may be computed
from others, as those of packed weights are; they are computed here with onnx's reference
evaluator, not with what wrote them or what runs them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.shape_inference import infer_shapes

from sqakd_deploy.spec import SPEC_KEY
from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.computed import computed_constants
from sqakd_deploy.verification.flow import dependent, used
from sqakd_deploy.verification.layout import channels_first
from sqakd_deploy.verification.settings import AXIS, settings_in

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WITH_CONSTANT = ("Add", "Expand", "Mul", "PRelu")

FoundFacts: TypeAlias = Iterator[tuple[str, NDArray[Any]]]


@dataclass(frozen=True)
class Quantized:
    """A quantised tensor of a file.

    Attributes:
        layer: the quantizer's name.
        value: name of the value that holds it.
        dtype: ``"uint8"`` or ``"int8"``.
        scale: that its first reader multiplies by.
        zero_point: that its first reader subtracts, counted from the lowest code of its type.
        layers: names of the nodes that compute it from the tensors in ``parents``.
        parents: quantizers of the nearest quantised tensors before it.
        real: whether ``value`` holds the reals that codes stand for, instead of the codes.
    """

    layer: str
    value: str
    dtype: str
    scale: float
    zero_point: int
    layers: tuple[str, ...]
    parents: tuple[str, ...]
    real: bool

    def codes(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Codes, counted from the lowest of their type, of what ``value`` holds."""
        if not self.real:
            return (values - c.offset(self.dtype)).astype(np.uint8)
        levels = np.rint(np.nan_to_num(values) / np.float32(self.scale))
        return (levels + self.zero_point).astype(np.uint8)


class OnnxFile(ABC):
    """An ONNX file to be asked for its constants.

    Args:
        path: of the file.
        model: what was read there.

    Attributes:
        path: as given.
        model: as given.
        known_form: whether it has constants and quantised tensors in a form that is read here.
        holds_reals: whether quantised tensors are held as the reals that their codes stand for.

    Raises:
        ExportError: if constants cannot be computed.
    """

    known_form: bool
    holds_reals: bool

    def __init__(self, path: Path, model: ModelProto) -> None:
        self.path = path
        self.model = model
        graph = self.model.graph
        self._nodes = list(graph.node)
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._computed = computed_constants(self.model, path)
        self._dependent = dependent(self._nodes, {source.name for source in self.inputs})
        # A layer is what the answers depend on: a copy beside it, of its name, is none.
        live = used(self._nodes, [result.name for result in graph.output])
        self._by_name = {n.name: n for n in self._nodes if n.name and live.intersection(n.output)}

    @property
    def inputs(self) -> list[ValueInfoProto]:
        """What has to be fed: older files name their initializers among the inputs, too."""
        held = {tensor.name for tensor in self.model.graph.initializer}
        return [source for source in self.model.graph.input if source.name not in held]

    @property
    def nodes(self) -> list[NodeProto]:
        """All of the graph."""
        return self._nodes

    def depends(self, name: str) -> bool:
        """Whether a value depends on what images hold, and not on their number and size alone."""
        return name in self._dependent

    def factors(self) -> frozenset[str]:
        """What products and quotients give that are compared as a quantizer's scales."""
        return frozenset()

    # -- what it says of itself --------------------------------------------------------------

    @property
    def target(self) -> str | None:
        """The target that the file was written for, if it says so."""
        own = self.stated("sqakd.target")
        return own if isinstance(own, str) else self._fact(SPEC_KEY, "target")

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes raw pixels."""
        kinds = [source.type.tensor_type.elem_type for source in self.inputs]
        return kinds == [TensorProto.UINT8]

    def _fact(self, key: str, field: str) -> str | None:
        """A text in the file's metadata, None where there is none."""
        facts = self.stated(key)
        value = facts.get(field) if isinstance(facts, dict) else None
        return value if isinstance(value, str) else None

    def stated(self, key: str) -> object:
        """What stands under a key of the metadata, None where it is missing or no JSON."""
        if self.unreadable(key):
            return None
        found: object = json.loads(self._metadata().get(key, "null"))
        return found

    def unreadable(self, key: str) -> bool:
        """Whether what stands under a key of the metadata is no JSON."""
        try:
            json.loads(self._metadata().get(key, "null"))
        except ValueError:
            return True
        return False

    def _metadata(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @property
    def batch(self) -> int | None:
        """The batch size that the file insists on, None if any will do."""
        inputs = self.inputs
        dims = inputs[0].type.tensor_type.shape.dim if inputs else ()
        return int(dims[0].dim_value) or None if dims else None

    # -- what a form must say of its quantizers ----------------------------------------------

    @property
    @abstractmethod
    def quantizers(self) -> dict[str, NodeProto]:
        """Every named quantizer of a tensor that depends on the images, in topological order."""

    @abstractmethod
    def _unsupported(self, node: NodeProto) -> str | None:
        """What keeps a quantizer from being compared; None if nothing does."""

    @abstractmethod
    def _quantizer(self, node: NodeProto) -> FoundFacts:
        """Facts of a quantizer that can be compared."""

    @abstractmethod
    def _coded_weight(self, node: NodeProto) -> FoundFacts:
        """Facts of a layer's weight, if it has codes."""

    @abstractmethod
    def _held(self, node: NodeProto) -> str:
        """The value that holds what a quantizer makes."""

    @abstractmethod
    def _dtype(self, node: NodeProto) -> str:
        """The type of a quantizer's codes, ``"uint8"`` or ``"int8"``."""

    # -- constants ---------------------------------------------------------------------------

    @cached_property
    def unsupported(self) -> dict[str, str]:
        """What keeps quantizers of other tools from being compared, by the quantizer's name."""
        found = {name: self._unsupported(node) for name, node in self.quantizers.items()}
        return {name: reason for name, reason in found.items() if reason is not None}

    def node(self, name: str) -> NodeProto:
        """The node of a name that is in :attr:`constants`."""
        return self._by_name[name]

    def producer(self, name: str) -> NodeProto | None:
        """The node that writes a value."""
        return self._producers.get(name)

    def constant(self, name: str) -> NDArray[Any] | None:
        """What a constant holds; None for a value that depends on the images."""
        if name in self._computed:
            return self._computed[name]
        tensor = self._initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    @cached_property
    def constants(self) -> dict[str, c.Facts]:
        """The facts of every layer that has any, by the names of the nodes."""
        found = {name: dict(self._facts(node)) for name, node in self._by_name.items()}
        return {name: facts for name, facts in found.items() if facts}

    def _facts(self, node: NodeProto) -> FoundFacts:
        yield from settings_in(node, self.producer, self.constant, self.zero_before)
        if node.name in self.quantizers:
            if node.name not in self.unsupported:
                yield from self._quantizer(node)
        elif node.op_type in _LAYERS:
            yield from self._layer(node)
        elif node.op_type == "Relu":
            yield c.LOWER, np.array(0.0, np.float32)
        elif node.op_type == "Clip":
            for name, value in zip((c.LOWER, c.UPPER), self._tensorwise(node), strict=False):
                if value is not None:
                    yield name, value
        elif node.op_type in ("BatchNormalization", "LayerNormalization"):
            for name, value in zip((c.SCALE, c.SHIFT), self._inputs(node, 1), strict=False):
                if value is not None:
                    yield name, value
        elif node.op_type in ("LogSoftmax", "Softmax"):
            axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
            axis, rank = [*axes, -1][0], self._ranks.get(node.output[0])
            if axis < 0 or rank is not None:
                yield AXIS, np.array(c.from_behind(axis, rank or 0))
        elif node.op_type == "Resize" and len(node.input) == 3:
            scales = self.constant(node.input[2])
            if scales is not None:
                yield c.SCALE, scales
        elif node.op_type in _WITH_CONSTANT:
            known = [value for value in self._inputs(node, 0) if value is not None]
            if len(known) == 1:
                yield c.CONSTANT, known[0]

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """How many axes values have, where that can be told."""
        try:
            inferred = infer_shapes(self.model).graph
        except Exception:  # whatever it raises of strangers' nodes, or of 2 GB
            return {}
        types = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
        return {name: len(t.shape.dim) for name, t in types.items() if t.HasField("shape")}

    def _inputs(self, node: NodeProto, first: int) -> list[NDArray[Any] | None]:
        return [self.constant(name) for name in node.input[first:]]

    def _tensorwise(self, node: NodeProto) -> list[NDArray[Any] | None]:
        """Constants behind the first input; one number for the tensor may have a shape of (1,)."""
        found = self._inputs(node, 1)
        return [v.reshape(()) if v is not None and v.size == 1 else v for v in found]

    def _layer(self, node: NodeProto) -> FoundFacts:
        if len(node.input) < 2:
            return
        coded = dict(self._coded_weight(node))
        yield from coded.items()
        floats = None if coded else self.constant(node.input[1])
        if floats is not None:
            yield c.WEIGHT, channels_first(node, floats)
        if len(node.input) > 2 and node.input[2]:
            yield from self._bias(node.input[2])

    def _bias(self, name: str) -> FoundFacts:
        floats = self.constant(name)
        if floats is not None:
            yield c.BIAS, floats

    def zero_before(self, node: NodeProto) -> float:
        """The zero-point of the codes that a node reads; 0 of reals, which other forms hold."""
        return 0.0

    # -- quantised tensors -------------------------------------------------------------------

    @cached_property
    def quantized(self) -> dict[str, Quantized]:
        """Every 8-bit tensor that a named quantizer writes, in topological order."""
        nodes = {n: node for n, node in self.quantizers.items() if n not in self.unsupported}
        whole = {name: self._whole(node) for name, node in nodes.items()}
        held = {value: name for name, value in whole.values()}
        found: dict[str, Quantized] = {}
        for part, node in nodes.items():
            name, value = whole[part]
            layers, parents = self._before(node, held)
            if name in found:  # another part of one tensor
                layers = (*found[name].layers, *layers)
                parents = tuple(dict.fromkeys((*found[name].parents, *parents)))
            facts, dtype = self.constants[part], self._dtype(node)
            scale, zero = facts[c.SCALE], int(facts[c.READER_ZERO][0])
            first = float(scale[0] if scale.size else facts[c.STEP])
            found[name] = Quantized(
                name, value, dtype, first, zero, layers, parents, self.holds_reals
            )
        return found

    def _whole(self, node: NodeProto) -> tuple[str, str]:
        """A quantizer's name and the value that holds its tensor: of parts, where they are joined.

        Exporters round the parts of a concatenation instead of the whole, and call what does so
        ``quantizer/0``, ``quantizer/1`` and so on.
        """
        value = self._held(node)
        base, _, number = node.name.rpartition("/")
        readers = self._readers.get(value, [])
        if base and number.isdecimal() and base not in self._by_name:
            joins = [reader for reader in readers if reader.op_type == "Concat"]
            if joins:
                return base, str(joins[0].output[0])
        return node.name, value

    def inputs_of_layers(self) -> dict[str, tuple[str, ...]]:
        """Quantizers of what each layer with weights reads, by the layer's name."""
        held = {tensor.value: name for name, tensor in self.quantized.items()}
        found = {}
        for node in self._nodes:
            if node.op_type in _LAYERS:
                _, parents = self._before(node, held)
                if parents:
                    found[node.name] = parents
        return found

    def _before(
        self, node: NodeProto, held: dict[str, str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the nodes between a quantizer and the quantised tensors before it, and these."""
        layers, parents = [node.name], []
        left, seen = list(node.input[:1]), set()
        while left:
            value = left.pop()
            producer = self._producers.get(value)
            if value in seen or producer is None:
                continue
            seen.add(value)
            if value in held:
                parents.append(held[value])
                continue
            layers.append(producer.name)
            left += producer.input
        return tuple(layers), tuple(parents)

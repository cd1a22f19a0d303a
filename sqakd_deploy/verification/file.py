"""A QDQ ONNX file as its layers' constants and quantised tensors.

Layers are found by the names of their nodes, which every exporter keeps. Constants may be computed
from others, as those of packed weights are; they are computed here with onnx's reference
evaluator, not with what wrote them or what runs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from sqakd_deploy.errors import ExportError
from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.computed import computed_constants
from sqakd_deploy.verification.layout import channels_first, channelwise, scales_channels, unique
from sqakd_deploy.verification.settings import settings_in

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WITH_CONSTANT = ("Add", "Mul", "Expand")
_INTEGER_TYPES = ("uint8", "int8")


@dataclass(frozen=True)
class Quantized:
    """A quantised tensor of a file.

    Attributes:
        layer: the quantizer's name.
        value: name of the value that holds its codes.
        dtype: ``"uint8"`` or ``"int8"``.
        scale: that its first reader multiplies by.
        zero_point: that its first reader subtracts.
        layers: names of the nodes that compute it from the tensors in ``parents``.
        parents: quantizers of the nearest quantised tensors before it.
    """

    layer: str
    value: str
    dtype: str
    scale: float
    zero_point: int
    layers: tuple[str, ...]
    parents: tuple[str, ...]


class QdqFile:
    """An ONNX file to be asked for its constants.

    Args:
        path: of the file.

    Attributes:
        path: as given.
        model: as read.

    Raises:
        ExportError: if it is no ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = _load(path)
        graph = self.model.graph
        self._nodes = list(graph.node)
        self._by_name = {node.name: node for node in self._nodes if node.name}
        self._producers = {name: node for node in self._nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._computed = computed_constants(self.model, path)

    @property
    def target(self) -> str | None:
        """The target that the file was written for, if it says so."""
        own = self.stated("sqakd.target")
        return own if isinstance(own, str) else self._fact("sqakd.spec", "target")

    @property
    def is_qdq(self) -> bool:
        """Whether its layers' constants are those of QuantizeLinear and DequantizeLinear."""
        return any(node.op_type == "DequantizeLinear" for node in self._nodes)

    @property
    def takes_codes(self) -> bool:
        """Whether raw pixels are the codes that the student's first quantizer would have made."""
        return self._fact("sqakd.input", "normalisation") == "folded"

    @property
    def takes_pixels(self) -> bool:
        """Whether it takes raw pixels."""
        kinds = [source.type.tensor_type.elem_type for source in self.model.graph.input]
        return kinds == [TensorProto.UINT8]

    def _fact(self, key: str, field: str) -> str | None:
        """A text in the file's metadata, None where there is none."""
        facts = self.stated(key)
        value = facts.get(field) if isinstance(facts, dict) else None
        return value if isinstance(value, str) else None

    def stated(self, key: str) -> object:
        """What stands under a key of the metadata, None where it is missing or no JSON."""
        facts = {entry.key: entry.value for entry in self.model.metadata_props}
        try:
            found: object = json.loads(facts.get(key, "null"))
        except ValueError:
            return None
        return found

    @property
    def batch(self) -> int | None:
        """The batch size that the file insists on, None if any will do."""
        inputs = self.model.graph.input
        dims = inputs[0].type.tensor_type.shape.dim if inputs else ()
        return int(dims[0].dim_value) or None if dims else None

    # -- constants ---------------------------------------------------------------------------

    @property
    def quantizers(self) -> dict[str, NodeProto]:
        """Every named QuantizeLinear, in topological order."""
        return {n.name: n for n in self._nodes if n.name and n.op_type == "QuantizeLinear"}

    @cached_property
    def unsupported(self) -> dict[str, str]:
        """What keeps quantizers of other tools from being compared, by the quantizer's name."""
        found = {name: self._unsupported(node) for name, node in self.quantizers.items()}
        return {name: reason for name, reason in found.items() if reason is not None}

    def _unsupported(self, node: NodeProto) -> str | None:
        step, zero = [*self._tensorwise(node), None][:2]
        if step is None:
            return "its scale depends on the images; wanted a constant"
        if step.ndim:
            return f"it has {step.size} scales, one a channel; wanted one for the tensor"
        if zero is not None and str(zero.dtype) not in _INTEGER_TYPES:
            return f"its codes are {zero.dtype}; wanted uint8 or int8"
        return None

    def producer(self, name: str) -> NodeProto | None:
        """The node that writes a value."""
        return self._producers.get(name)

    def clip_behind(self, node: NodeProto) -> NodeProto | None:
        """The Clip on a quantizer's codes, if there is one."""
        readers = self._readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == "Clip" else None

    def reader_count(self, name: str) -> int:
        """How many nodes read a value."""
        return len(self._readers.get(name, []))

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

    def input_facts(self) -> c.Facts:
        """What readers make of the codes of the graph's input, where it is codes."""
        return dict(self._read_by(self.model.graph.input[0].name, 0))

    def _facts(self, node: NodeProto) -> Iterator[tuple[str, NDArray[Any]]]:
        yield from settings_in(node, self.producer, self.constant)
        if node.op_type == "QuantizeLinear":
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
        elif node.op_type == "Resize" and len(node.input) == 3:
            scales = self.constant(node.input[2])
            if scales is not None:
                yield c.SCALE, scales
        elif node.op_type in _WITH_CONSTANT:
            known = [value for value in self._inputs(node, 0) if value is not None]
            if len(known) == 1:
                yield c.CONSTANT, known[0]

    def _inputs(self, node: NodeProto, first: int) -> list[NDArray[Any] | None]:
        return [self.constant(name) for name in node.input[first:]]

    def _tensorwise(self, node: NodeProto) -> list[NDArray[Any] | None]:
        """Constants behind the first input; one number for the tensor may have a shape of (1,)."""
        found = self._inputs(node, 1)
        return [v.reshape(()) if v is not None and v.size == 1 else v for v in found]

    def _layer(self, node: NodeProto) -> Iterator[tuple[str, NDArray[Any]]]:
        if len(node.input) < 2:
            return
        weight = self._producers.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            codes, scale, zero = [*self._inputs(weight, 0), None][:3]
            if codes is not None and scale is not None:
                codes = channels_first(node, codes)
                yield c.WEIGHT_CODES, codes
                yield c.WEIGHT_SCALE, channelwise(scale, codes)
                if scale.size > 1 and not scales_channels(node, weight, codes.ndim):
                    yield c.WEIGHT_AXIS, scale
                yield c.WEIGHT_ZERO, np.zeros(1, np.int64) if zero is None else unique(zero)
        else:
            floats = self.constant(node.input[1])
            if floats is not None:
                yield c.WEIGHT, channels_first(node, floats)
        if len(node.input) > 2 and node.input[2]:
            yield from self._bias(node.input[2])

    def _bias(self, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
        bias = self._producers.get(name)
        if bias is None or bias.op_type != "DequantizeLinear":
            floats = self.constant(name)
            if floats is not None:
                yield c.BIAS, floats
            return
        codes, scale = self._inputs(bias, 0)[:2]
        if codes is not None and scale is not None:
            yield c.BIAS_CODES, codes
            yield c.BIAS_SCALE, channelwise(scale, codes)

    def _quantizer(self, node: NodeProto) -> Iterator[tuple[str, NDArray[Any]]]:
        step, zero = [*self._tensorwise(node), None][:2]
        zero = np.array(0, np.uint8) if zero is None else zero
        if step is None or self._unsupported(node) is not None:
            return
        low, limits = c.offset(str(zero.dtype)), np.iinfo(zero.dtype)
        clip = self.clip_behind(node)
        lowest, highest = [*(self._tensorwise(clip) if clip else ()), None, None][:2]
        yield c.STEP, step
        yield c.ZERO_POINT, np.array(int(zero) - low)
        yield c.LOWEST, np.array((limits.min if lowest is None else int(lowest)) - low)
        yield c.HIGHEST, np.array((limits.max if highest is None else int(highest)) - low)
        yield from self._read_by(self._held(node), low)

    def _read_by(self, value: str, low: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """What readers multiply codes by, and subtract from them, counted from the lowest code."""
        readers = self._dequantizers(value)
        scales = [self.constant(reader.input[1]) for reader in readers]
        yield c.SCALE, unique(*(scale for scale in scales if scale is not None))
        zeros = [[*self._inputs(reader, 2), np.array(0)][0] for reader in readers]
        codes = [zero.astype(np.int64) - low for zero in zeros if zero is not None]
        yield c.READER_ZERO, unique(*codes or [np.array(-low)])

    # -- quantised tensors -------------------------------------------------------------------

    def _held(self, node: NodeProto) -> str:
        clip = self.clip_behind(node)
        return str((node if clip is None else clip).output[0])

    def _dequantizers(self, value: str) -> list[NodeProto]:
        """Readers that dequantise a value, or what nodes that move data make of it."""
        found = []
        for reader in self._readers.get(value, []):
            if reader.op_type == "DequantizeLinear":
                found.append(reader)
            elif reader.op_type != "QuantizeLinear":
                found += [d for name in reader.output for d in self._dequantizers(name)]
        return found

    @cached_property
    def quantized(self) -> dict[str, Quantized]:
        """Every 8-bit tensor that a named quantizer writes, in topological order."""
        facts = self.constants
        nodes = {
            node.name: node
            for node in self._nodes
            if node.op_type == "QuantizeLinear" and c.STEP in facts.get(node.name, {})
        }
        whole = {name: self._whole(node) for name, node in nodes.items()}
        held = {value: name for name, value in whole.values()}
        found: dict[str, Quantized] = {}
        for part, node in nodes.items():
            name, value = whole[part]
            layers, parents = self._before(node, held)
            if name in found:  # another part of one tensor
                layers = (*found[name].layers, *layers)
                parents = tuple(dict.fromkeys((*found[name].parents, *parents)))
            zero = self.constant(node.input[2]) if len(node.input) > 2 else None
            dtype = "uint8" if zero is None else str(zero.dtype)
            scale, offset = facts[part][c.SCALE], facts[part][c.READER_ZERO]
            first = float(scale[0] if scale.size else facts[part][c.STEP])
            found[name] = Quantized(name, value, dtype, first, int(offset[0]), layers, parents)
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


def _load(path: Path) -> ModelProto:
    if path.suffix == ".xml" and path.is_file():
        raise ExportError(f"{path}: wanted an ONNX file, got OpenVINO IR, which export has proven")
    return read_onnx(path)

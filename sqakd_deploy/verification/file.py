"""A QDQ ONNX file as its layers' constants and quantised tensors."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto

from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.layout import channels_first, channelwise, scales_channels, unique
from sqakd_deploy.verification.onnx_layers import FoundFacts, OnnxFile

_INTEGER_TYPES = ("uint8", "int8")


class QdqFile(OnnxFile):
    """A file whose quantizers are QuantizeLinear, and whose readers are DequantizeLinear.

    Args:
        path: of the file.
        model: what is there; None reads it.

    Raises:
        ExportError: if it is no ONNX file.
    """

    holds_reals = False

    def __init__(self, path: Path, model: ModelProto | None = None) -> None:
        super().__init__(path, read_onnx(path) if model is None else model)
        self.known_form = any(node.op_type == "DequantizeLinear" for node in self._nodes)

    @property
    def takes_codes(self) -> bool:
        """Whether raw pixels are the codes that the student's first quantizer would have made:
        whether no Div, by 255, follows."""
        if not self.takes_pixels:
            return False
        reals = [d.output[0] for d in self._dequantizers(self.inputs[0].name)]
        readers = [reader for real in reals for reader in self._readers.get(real, [])]
        return bool(readers) and all(reader.op_type != "Div" for reader in readers)

    @cached_property
    def quantizers(self) -> dict[str, NodeProto]:
        """Every named QuantizeLinear, in topological order."""
        return {n.name: n for n in self._nodes if n.name and n.op_type == "QuantizeLinear"}

    def _unsupported(self, node: NodeProto) -> str | None:
        step, zero = [*self._tensorwise(node), None][:2]
        if step is None:
            return "its scale depends on the images; wanted a constant"
        if step.ndim:
            return f"it has {step.size} scales, one a channel; wanted one for the tensor"
        if zero is not None and str(zero.dtype) not in _INTEGER_TYPES:
            return f"its codes are {zero.dtype}; wanted uint8 or int8"
        return None

    def clip_behind(self, node: NodeProto) -> NodeProto | None:
        """The Clip on a quantizer's codes, if there is one."""
        readers = self._readers.get(node.output[0], [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == "Clip" else None

    def reader_count(self, name: str) -> int:
        """How many nodes read a value."""
        return len(self._readers.get(name, []))

    def input_facts(self) -> c.Facts:
        """What readers make of the codes of the graph's input, where it is codes."""
        return dict(self._read_by(self.inputs[0].name, 0))

    def zero_before(self, node: NodeProto) -> float:
        """The zero-point of the codes that a node reads; 0 of reals."""
        before = self.producer(node.input[0])
        while before is not None and before.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            before = self.producer(before.input[0]) if before.input else None
        if before is None:
            return float(self.input_facts()[c.READER_ZERO][0]) if self.takes_codes else 0.0
        codes = before.op_type == "QuantizeLinear" and len(before.input) > 2
        zero = self.constant(before.input[2]) if codes else None
        return float(zero.item()) if zero is not None and zero.size == 1 else 0.0

    def _coded_weight(self, node: NodeProto) -> FoundFacts:
        weight = self._producers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            return
        codes, scale, zero = [*self._inputs(weight, 0), None][:3]
        if codes is None or scale is None:
            return
        codes = channels_first(node, codes)
        yield c.WEIGHT_CODES, codes
        yield c.WEIGHT_SCALE, channelwise(scale, codes)
        if scale.size > 1 and not scales_channels(node, weight, codes.ndim):
            yield c.WEIGHT_AXIS, scale
        yield c.WEIGHT_ZERO, np.zeros(1, np.int64) if zero is None else unique(zero)

    def _bias(self, name: str) -> FoundFacts:
        bias = self._producers.get(name)
        if bias is None or bias.op_type != "DequantizeLinear":
            yield from super()._bias(name)
            return
        codes, scale, zero = [*self._inputs(bias, 0), None][:3]
        if codes is not None and scale is not None:
            yield c.BIAS_CODES, codes if zero is None else codes - zero  # the student's is 0
            yield c.BIAS_SCALE, channelwise(scale, codes)

    def _quantizer(self, node: NodeProto) -> FoundFacts:
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

    def _read_by(self, value: str, low: int) -> FoundFacts:
        """What readers multiply codes by, and subtract from them, counted from the lowest code."""
        readers = self._dequantizers(value)
        scales = [self.constant(reader.input[1]) for reader in readers]
        yield c.SCALE, unique(*(scale for scale in scales if scale is not None))
        zeros = [[*self._inputs(reader, 2), np.array(0)][0] for reader in readers]
        codes = [zero.astype(np.int64) - low for zero in zeros if zero is not None]
        yield c.READER_ZERO, unique(*codes or [np.array(-low)])

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

    def _dtype(self, node: NodeProto) -> str:
        zero = self.constant(node.input[2]) if len(node.input) > 2 else None
        return "uint8" if zero is None else str(zero.dtype)

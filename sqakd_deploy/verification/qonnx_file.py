"""A QONNX file as its layers' constants and quantised tensors.

A quantised tensor is held as the reals that its codes stand for: ``scale · (q − zero_point)``.
Codes of weights are what the node behind them makes of the reals in the file, as the format says
(Pappalardo et al., 2022), and are computed here without the package qonnx.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.layout import channels_first, unique
from sqakd_deploy.verification.onnx_layers import FoundFacts, OnnxFile

_OF_INTEGERS = ("IntQuant", "Quant")
_BIPOLAR = "BipolarQuant"
_ROUNDING = ("ROUND", "HALF_EVEN")
_WIDEST = 8


def is_quantizer(node: NodeProto) -> bool:
    """Whether a node is one of QONNX's that put a tensor on a grid."""
    return node.op_type in (*_OF_INTEGERS, _BIPOLAR)


class QonnxFile(OnnxFile):
    """A file whose quantizers are IntQuant, and BipolarQuant of weights.

    Where a student divides by another step than it multiplies by (EWGS), a Div stands before its
    quantizer, which then has the scale 1, and a Mul behind it.
    """

    known_form = True
    holds_reals = True

    @cached_property
    def quantizers(self) -> dict[str, NodeProto]:
        """Every named IntQuant or BipolarQuant that is not of a constant, in topological order."""
        return {
            node.name: node
            for node in self._nodes
            if node.name and is_quantizer(node) and self.constant(node.input[0]) is None
        }

    def _unsupported(self, node: NodeProto) -> str | None:
        if node.op_type == _BIPOLAR:
            return "its codes are -1 and 1; wanted an IntQuant"
        scale, zero, bits = self._tensorwise(node)[:3]
        if scale is None or zero is None or bits is None:
            return "its scale, zero-point or bit width depends on the images; wanted constants"
        if scale.ndim or zero.ndim or bits.ndim:
            return f"it has {scale.size} scales, one a channel; wanted one for the tensor"
        if not 0 < scale < np.inf:
            return f"its scale is {scale:g}; wanted one above 0"
        if zero != np.rint(zero) or bits not in range(1, _WIDEST + 1):
            return f"its zero-point is {zero:g} and it has {bits:g} bits; wanted integers, up to 8"
        return None if _rounds_half_to_even(node) else "it rounds otherwise than half to even"

    def _quantizer(self, node: NodeProto) -> FoundFacts:
        scale, zero, bits = self._tensorwise(node)[:3]
        assert scale is not None  # see _unsupported
        assert zero is not None
        assert bits is not None
        low = c.offset(self._dtype(node))
        lowest, highest = _limits(node, int(bits))
        step, behind = self._step(node), self._scaled(node)
        yield c.STEP, scale if step is None else step * scale
        yield c.ZERO_POINT, np.array(int(zero) - low)
        yield c.LOWEST, np.array(lowest - low)
        yield c.HIGHEST, np.array(highest - low)
        yield c.SCALE, np.reshape(scale if behind is None else scale * self._number(behind), 1)
        yield c.READER_ZERO, np.array([int(zero) - low])

    def _step(self, node: NodeProto) -> NDArray[Any] | None:
        """What a Div before a quantizer divides by; None where there is none."""
        before = self.producer(node.input[0])
        return self._number(before) if before is not None and before.op_type == "Div" else None

    def _scaled(self, node: NodeProto) -> NodeProto | None:
        """The Mul behind a quantizer that has a Div before it; None where there is none."""
        readers = self._readers.get(node.output[0], [])
        if self._step(node) is None or len(readers) != 1 or readers[0].op_type != "Mul":
            return None
        return None if self._number(readers[0]) is None else readers[0]

    def factors(self) -> frozenset[str]:
        """What the Div before a quantizer and the Mul behind it give."""
        found: set[str] = set()
        for node in self.quantizers.values():
            if self._step(node) is not None:
                found |= {str(node.input[0]), self._held(node)}
        return frozenset(found)

    def _number(self, node: NodeProto) -> NDArray[Any] | None:
        """The one number that is the second input of an operator; None where that is another."""
        (value,) = self._tensorwise(node)
        return None if value is None or value.ndim else value

    def _held(self, node: NodeProto) -> str:
        return str((self._scaled(node) or node).output[0])

    def _dtype(self, node: NodeProto) -> str:
        return "int8" if _attributes(node).get("signed", 1) else "uint8"

    def _coded_weight(self, node: NodeProto) -> FoundFacts:
        quantizer = self.producer(node.input[1])
        if quantizer is None or not is_quantizer(quantizer):
            return
        more = [np.zeros(1), np.ones(1)] if quantizer.op_type == _BIPOLAR else []
        known = [v for v in (*self._inputs(quantizer, 0), *more) if v is not None]
        if len(known) != 4 or known[3].size != 1 or not _rounds_half_to_even(quantizer):
            return
        reals, scale, zero, bits = known
        codes = _codes(quantizer, reals, scale, zero, int(bits.item()))
        yield c.WEIGHT_CODES, channels_first(node, codes)
        full = channels_first(node, np.broadcast_to(scale, reals.shape))
        scales = full.reshape(len(full), -1)
        yield c.WEIGHT_SCALE, scales[:, 0]
        if (scales != scales[:, :1]).any():
            yield c.WEIGHT_AXIS, scale
        yield c.WEIGHT_ZERO, unique(zero)
        yield c.WEIGHT_BITS, bits.reshape(())


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _limits(node: NodeProto, bits: int) -> tuple[int, int]:
    """The lowest and the highest code."""
    given = _attributes(node)
    narrow = int(given.get("narrow", 0))
    if given.get("signed", 1):
        return narrow - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def _rounds_half_to_even(node: NodeProto) -> bool:
    mode = _attributes(node).get("rounding_mode", b"ROUND")
    return mode.decode().upper() in _ROUNDING


def _codes(
    node: NodeProto, reals: NDArray[Any], scale: NDArray[Any], zero: NDArray[Any], bits: int
) -> NDArray[np.int64]:
    """What a quantizer makes of a constant, before its zero-point is taken off again."""
    if node.op_type == _BIPOLAR:
        return np.where(reals >= 0, 1, -1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a scale of 0 is a difference already
        codes = np.rint(reals / scale + zero)
        return np.clip(codes, *_limits(node, bits)).astype(np.int64)

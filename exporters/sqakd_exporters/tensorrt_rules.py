"""What TensorRT's documentation asks of a QDQ file, each rule checked on the file itself.

Nothing here trusts who wrote the file, and nothing runs it: a file that holds every rule is one
that the documentation describes, not one that was seen to work. Where each rule is documented
stands in ``docs/runtime-rules.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from sqakd_deploy.exporting import RuleCheck
from sqakd_deploy.onnx_file import read_onnx
from sqakd_exporters.view import GraphView, attribute

SMALLEST_MATMUL = 16
"""Matrix products with fewer rows or columns of weights are not worth quantising (rule T10)."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PRODUCTS = ("Gemm", "MatMul")
_MOVING = (
    "Concat",
    "Flatten",
    "Identity",
    "MaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators that TensorRT moves a DequantizeLinear across."""

_FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4)

Check: TypeAlias = Callable[[GraphView], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """A documented rule.

    Attributes:
        number: in ``docs/runtime-rules.md``.
        says: what it says.
        source: who documents it.
        check: yields a line for each place where a file breaks it.
    """

    number: str
    says: str
    source: str
    check: Check


def check_file(path: Path) -> tuple[RuleCheck, ...]:
    """Check every rule on a file.

    Raises:
        ExportError: if it is no ONNX file.
    """
    return check_model(read_onnx(path))


def check_model(model: onnx.ModelProto) -> tuple[RuleCheck, ...]:
    """Check every rule on a model in memory."""
    file = GraphView(model)
    return tuple(
        RuleCheck(rule.number, rule.says, rule.source, tuple(rule.check(file))) for rule in RULES
    )


# -- one function per rule -------------------------------------------------------------------------


def zero_points_are_zero(file: GraphView) -> Iterator[str]:
    """T1. TensorRT quantises symmetrically; its parser refuses anything else."""
    for node in _quantizers(file):
        if len(node.input) < 3 or not node.input[2]:
            continue
        zero = file.constant(node.input[2])
        if zero is None:
            yield f"{_name(node)}: its zero-point is computed"
        elif np.any(zero.astype(np.int64)):
            yield f"{_name(node)}: zero-point {zero.astype(np.int64).flat[0]}"


def all_is_int8(file: GraphView) -> Iterator[str]:
    """T2. A QuantizeLinear without a zero-point writes uint8, too."""
    for node in _quantizers(file):
        codes = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        kind = file.type_of(codes)
        if kind == TensorProto.INT8 or (kind in _FOUR_BITS and file.constant(codes) is not None):
            continue
        kind_name = "unknown type" if kind is None else TensorProto.DataType.Name(kind).lower()
        if _is_bias(file, node):
            continue  # rule T3's affair
        yield f"{_name(node)}: {kind_name}"


def biases_are_float(file: GraphView) -> Iterator[str]:
    """T3. A DequantizeLinear takes no int32; TensorRT adds the float bias in its own way."""
    for node in file.nodes:
        if node.op_type in _WEIGHTED and len(node.input) > 2 and file.dequantizer(node.input[2]):
            yield f"{_name(node)}: its bias is dequantised"


def scales_fit(file: GraphView) -> Iterator[str]:
    """T4. One positive scale for an activation; one, or one an output channel, for weights."""
    for node in _quantizers(file):
        scale = file.constant(node.input[1])
        if scale is None:
            yield f"{_name(node)}: its scale is computed"
            continue
        if not np.all(scale > 0):
            yield f"{_name(node)}: a scale is not positive"
        weights = file.constant(node.input[0])
        if scale.size == 1:
            continue
        if weights is None:
            yield f"{_name(node)}: {scale.size} scales for an activation"
            continue
        axis = attribute(node, "axis", 1) % weights.ndim
        for reader in file.readers(node.output[0]):
            wanted = _output_axis(reader)
            if axis != wanted or scale.size != weights.shape[wanted]:
                yield (
                    f"{_name(reader)}: {scale.size} scales of its weights on axis {axis}, wanted "
                    f"{weights.shape[wanted]} on axis {wanted}"
                )


def weights_are_symmetric(file: GraphView) -> Iterator[str]:
    """T5. −128 has no counterpart."""
    for node in file.nodes:
        codes = _weight_codes(file, node)
        if codes is not None and codes.dtype == np.int8 and codes.min(initial=0) < -127:
            yield f"{_name(node)}: weight code {codes.min()}"


def inputs_are_quantised(file: GraphView) -> Iterator[str]:
    """T6. A layer with integer weights and a float input has no integer kernel."""
    for node in file.nodes:
        if node.op_type not in _WEIGHTED or _weight_codes(file, node) is None:
            continue
        if not _is_dequantised(file, node.input[0]):
            yield f"{_name(node)}: its input {node.input[0]!r} is not quantised"


def quantizers_are_pairs(file: GraphView) -> Iterator[str]:
    """T7. What TensorRT looks for is Q and DQ side by side, without operators on the codes."""
    for node in file.nodes:
        if node.op_type == "QuantizeLinear":
            kinds = [reader.op_type for reader in file.readers(node.output[0])]
            others = sorted(set(kinds) - {"DequantizeLinear"})
            if others or not kinds:
                yield f"{_name(node)}: its codes are read by {', '.join(others) or 'nothing'}"
        elif node.op_type == "DequantizeLinear" and file.constant(node.input[0]) is None:
            producer = file.producers.get(node.input[0])
            if producer is None or producer.op_type != "QuantizeLinear":
                source = "the graph's input" if producer is None else producer.op_type
                yield f"{_name(node)}: its codes come from {source}"


def sums_are_fused(file: GraphView) -> Iterator[str]:
    """T8. The convolution's own output goes into the sum unrounded, the skip branch quantised."""
    for node in file.nodes:
        if node.op_type != "Add" or not all(_is_data(file, name) for name in node.input):
            continue
        bare = [name for name in node.input if _is_convolution(file, name)]
        for name in node.input:
            if bare and name != bare[0] and not _is_dequantised(file, name):
                yield f"{_name(node)}: its skip branch {name!r} is not quantised"
        if not bare:
            for name in node.input:
                convolution = _rounded_for(file, name)
                if convolution is not None:
                    yield f"{_name(node)}: {_name(convolution)} is quantised before the sum"


def max_pools_have_no_quantizer(file: GraphView) -> Iterator[str]:
    """T9. TensorRT moves quantizers across a MaxPool; a second pair of one scale is in the way."""
    for node in file.nodes:
        before = file.dequantizer(node.input[0]) if node.op_type == "MaxPool" else None
        if before is None:
            continue
        scale = file.constant(before.input[1])
        for reader in file.readers(node.output[0]):
            if reader.op_type != "QuantizeLinear" or scale is None:
                continue
            own = file.constant(reader.input[1])
            if own is not None and np.array_equal(scale, own):
                yield f"{_name(node)}: {_name(reader)} quantises it again"


def small_ones_are_float(file: GraphView) -> Iterator[str]:
    """T10. Integer kernels do not pay for fewer than 16 inputs or outputs."""
    for node in file.nodes:
        codes = _weight_codes(file, node) if node.op_type in _PRODUCTS else None
        if codes is not None and min(codes.shape[-2:]) < SMALLEST_MATMUL:
            yield f"{_name(node)}: weights {'×'.join(map(str, codes.shape))}"


def four_bits_are_for_products(file: GraphView) -> Iterator[str]:
    """T11. INT4 weights have kernels in matrix products alone."""
    for node in file.nodes:
        if node.op_type != "DequantizeLinear" or file.type_of(node.input[0]) not in _FOUR_BITS:
            continue
        for reader in file.readers(node.output[0]):
            if reader.op_type not in _PRODUCTS:
                yield f"{_name(reader)}: 4-bit weights"


def outputs_are_float(file: GraphView) -> Iterator[str]:
    """T12. Outputs of layers are quantised for what reads them, not for their own sake."""
    for name in sorted(file.outputs):
        if file.dequantizer(name) is not None:
            yield f"output {name!r} is quantised"


_PARSER, _PLACEMENT = "onnx-tensorrt", "TensorRT: Q/DQ placement"
_TYPES, _OPTIMIZER = "TensorRT: quantized types", "Model Optimizer"

RULES: tuple[Rule, ...] = (
    Rule("T1", "every zero-point is 0", _PARSER, zero_points_are_zero),
    Rule("T2", "every code is int8", _PARSER, all_is_int8),
    Rule("T3", "biases are float", _PARSER, biases_are_float),
    Rule("T4", "one scale an activation, weights by output channel", _PLACEMENT, scales_fit),
    Rule("T5", "weights are within −127 and 127", _TYPES, weights_are_symmetric),
    Rule("T6", "layers of integers read quantised inputs", _PLACEMENT, inputs_are_quantised),
    Rule("T7", "Q and DQ stand side by side", _PLACEMENT, quantizers_are_pairs),
    Rule("T8", "sums: skip branch quantised, convolution not", _PLACEMENT, sums_are_fused),
    Rule("T9", "no quantizer of MaxPool's own", _PLACEMENT, max_pools_have_no_quantizer),
    Rule("T10", "products below 16 inputs or outputs in float", _OPTIMIZER, small_ones_are_float),
    Rule("T11", "4-bit weights in matrix products alone", _TYPES, four_bits_are_for_products),
    Rule("T12", "the model's output is float", _PLACEMENT, outputs_are_float),
)


# -- reading -----------------------------------------------------------------------------------


def _name(node: NodeProto) -> str:
    return str(node.name or node.output[0])


def _quantizers(file: GraphView) -> Iterator[NodeProto]:
    kinds = ("QuantizeLinear", "DequantizeLinear")
    yield from (node for node in file.nodes if node.op_type in kinds)


def _is_bias(file: GraphView, node: NodeProto) -> bool:
    readers = file.readers(node.output[0])
    return any(r.op_type in _WEIGHTED and node.output[0] in r.input[2:] for r in readers)


def _weight_codes(file: GraphView, node: NodeProto) -> np.ndarray | None:
    """What a layer's weights are dequantised from; None for other nodes and for float weights."""
    if node.op_type not in _WEIGHTED:
        return None
    source = file.dequantizer(node.input[1])
    return None if source is None else file.constant(source.input[0])


def _output_axis(reader: NodeProto) -> int:
    """The axis of a layer's weights that counts its outputs."""
    if reader.op_type == "Conv" or (reader.op_type == "Gemm" and attribute(reader, "transB", 0)):
        return 0
    return 1


def _is_data(file: GraphView, name: str) -> bool:
    producer = file.producers.get(name)
    return producer is not None and file.carries_data(producer)


def _is_dequantised(file: GraphView, name: str) -> bool:
    """Whether a value is a quantizer's, or what operators that move data made of such values."""
    producer = file.producers.get(name)
    if producer is None:
        return False
    if producer.op_type == "DequantizeLinear":
        return True
    if producer.op_type not in _MOVING:
        return False
    sources = producer.input if producer.op_type == "Concat" else producer.input[:1]
    return all(_is_dequantised(file, source) for source in sources)


def _is_convolution(file: GraphView, name: str) -> bool:
    """Whether a value is the own output of a convolution of integers, read by nothing else."""
    producer = file.producers.get(name)
    alone = len(file.readers(name)) == 1
    return (
        producer is not None
        and producer.op_type == "Conv"
        and alone
        and _weight_codes(file, producer) is not None
    )


def _rounded_for(file: GraphView, name: str) -> NodeProto | None:
    """The convolution whose output is quantised for one reader alone, without an activation."""
    dequantizer = file.dequantizer(name)
    if dequantizer is None or len(file.readers(name)) != 1:
        return None
    quantizer = file.producers.get(dequantizer.input[0])
    if quantizer is None or len(file.readers(quantizer.output[0])) != 1:
        return None
    source = quantizer.input[0]
    return file.producers[source] if _is_convolution(file, source) else None

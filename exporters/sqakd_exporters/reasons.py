"""Why a layer of a QDQ file stays in float: the rules of ``docs/runtime-rules.md``, one by one.

Each rule is a function of the file and a layer, and gives a line or nothing. A line that may apply
without having been the cause (the shape of a scale, say) is given only where no other does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto

from sqakd_exporters.floats import GATES
from sqakd_exporters.view import EIGHT_BIT, GraphView

Rule: TypeAlias = Callable[[GraphView, NodeProto], str | None]

_SPEC_KEY = "sqakd.spec"
_JOINS = ("Add", "Mul", "Concat", "MatMul")
_POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool")
_WITH_KERNEL = (*_JOINS, *_POOLS, "Conv", "Gemm", "LeakyRelu", "Resize", "Sigmoid", "Softmax")

# ONNX Runtime 1.32 takes a convolution's bias scale b for the accumulator's scale p where
# |b - p| ≤ 1e-6 + 1e-2·p, found by bisection; for Gemm it takes any.
_BIAS_ATOL, _BIAS_RTOL = 1e-6, 1e-2

_OPEN = (np.array(-np.inf), np.array(np.inf))  # bounds that a Clip leaves out


def reason(file: GraphView, layer: NodeProto) -> str:
    """Why a runtime left a layer in float.

    Args:
        file: the graph as written.
        layer: one of its nodes.
    """
    kernel = no_kernel(file, layer)
    if kernel is not None:  # nothing else matters then
        return kernel
    wish = excluded(file, layer)
    if wish is not None:  # a person's choice breaks no rule
        return wish
    for rules in (_CAUSES, _SUSPICIONS):
        found = [line for rule in rules if (line := rule(file, layer))]
        if found:
            return "; ".join(found)
    return "the runtime did not fuse it, though it follows the rules"


def excluded(file: GraphView, layer: NodeProto) -> str | None:
    """A person's choice: a pattern in the spec that travels with the file names the layer."""
    wish = excluded_by(file.metadata, layer.name)
    return wish if weights(file, layer) or inputs(file, layer) else None


def excluded_by(metadata: Mapping[str, str], name: str) -> str | None:
    """That a pattern in a file's spec excludes a layer of that name, if one does."""
    try:
        patterns = json.loads(metadata.get(_SPEC_KEY, "{}")).get("exclude", ())
        named = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
    except (ValueError, AttributeError, TypeError):
        return None  # another program's, or another version's
    return f"excluded from quantization ({named[0]!r})" if named else None


def no_kernel(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 10: some operators have no integer kernel."""
    whole = _gated(file, layer)
    if whole is not None:
        return f"it is part of a {whole}, for which the runtime has no integer kernel (rule 10)"
    if layer.op_type not in _WITH_KERNEL:
        return f"the runtime has no integer {layer.op_type} (rule 10)"
    if layer.op_type in ("Softmax", "Resize"):
        return f"the runtime's integer {layer.op_type} is not exact (rule 10)"
    if layer.op_type == "Mul" and any(file.constant(name) is not None for name in layer.input):
        return "it multiplies by a float constant (rule 8)"
    return None


def _gated(file: GraphView, layer: NodeProto) -> str | None:
    """Of what ``x · gate(x)`` the layer is a part, if it is."""
    products = file.readers(layer.output[0]) if layer.op_type in GATES else [layer]
    for product in products:
        gates = [file.producers[name] for name in product.input if name in file.producers]
        for gate in gates if product.op_type == "Mul" else []:
            if gate.op_type in GATES and gate.input[0] in product.input:
                return GATES[gate.op_type]
    return None


def inputs(file: GraphView, layer: NodeProto) -> str | None:
    """Rules 1, 8 and 15: every data input comes from 8-bit integers."""
    rule = 8 if layer.op_type in ("Add", "Mul") else 1
    for name in _data_inputs(layer):
        dequantizer = file.dequantizer(name)
        if file.constant(name) is not None:
            return f"it reads a float constant (rule {rule})"
        if dequantizer is None:
            product = _product(file, layer, name)
            return product or f"input {file.called(name)!r} is not quantised (rule {rule})"
        if file.type_of(dequantizer.input[0]) not in (None, *EIGHT_BIT):
            return f"input {file.called(name)!r} is neither int8 nor uint8 (rule 15)"
    return None


def weights(file: GraphView, layer: NodeProto) -> str | None:
    """Rules 1 and 16: weights are dequantised from 8-bit integers."""
    if layer.op_type not in ("Conv", "Gemm"):
        return None
    dequantizer = file.dequantizer(layer.input[1])
    if dequantizer is None:
        return "weights are float (rule 1)"
    if file.type_of(dequantizer.input[0]) not in (None, *EIGHT_BIT):
        return "weights are not 8-bit integers when they are dequantised (rule 16)"
    return None


def output(file: GraphView, layer: NodeProto) -> str | None:
    """Rules 1, 2, 3, 6 and 7: one quantizer reads the output, at most an activation between."""
    if layer.op_type == "MaxPool" or (layer.op_type in ("Gemm", "MatMul")):
        return None  # these need no quantizer; see `moved` and `gemm_output`
    return _unquantised(file, layer)


def gemm_output(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 11: a Gemm without a quantizer behind it has an integer bias or none."""
    if layer.op_type not in ("Gemm", "MatMul"):
        return None
    bias = _float_bias(file, layer)
    problem = _unquantised(file, layer)
    if problem is None or bias is None:
        return _activation_problem(file, layer)
    return "its bias is float and the output is not quantised (rule 11)"


def bias(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 12: an integer bias has the accumulator's scale."""
    if layer.op_type != "Conv" or len(layer.input) < 3:
        return None
    parts = [file.dequantizer(name) for name in layer.input[:3]]
    scales = [None if part is None else file.constant(part.input[1]) for part in parts]
    data, weight, given = (None if s is None else s.astype(np.float64) for s in scales)
    if data is None or weight is None or given is None:
        return None
    if np.allclose(given, data * weight, rtol=_BIAS_RTOL, atol=_BIAS_ATOL):
        return None
    return "bias scale is not input scale × weight scale (rule 12)"


def moved(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 9: a MaxPool between quantizers has one scale and zero-point on both sides."""
    readers = file.readers(layer.output[0])
    dequantizer = file.dequantizer(layer.input[0])
    if layer.op_type != "MaxPool" or dequantizer is None or len(readers) != 1:
        return None
    before, after = dequantizer.input[1:], readers[0].input[1:]
    if readers[0].op_type != "QuantizeLinear" or _same(file, list(before), list(after)):
        return None
    return "scale or zero-point differ before and after it (rule 9)"


def rank(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 4: scales and zero-points of activations have rank 0."""
    if layer.op_type not in (*_JOINS, *_POOLS, "Conv", "Gemm"):
        return None
    around = [node for name in _data_inputs(layer) if (node := file.dequantizer(name))]
    around += [n for n in file.readers(layer.output[0]) if n.op_type == "QuantizeLinear"]
    for node in around:
        for name in node.input[1:]:
            value = file.constant(name)
            if value is not None and value.ndim != 0:
                return f"{file.called(name)!r} has shape {value.shape}, not () (rule 4)"
    return None


def zero_point(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 5: zero-points are explicit."""
    for name in _data_inputs(layer):
        dequantizer = file.dequantizer(name)
        if dequantizer is not None and len(dequantizer.input) < 3:
            called = file.called(name)
            return f"input {called!r} is dequantised without an explicit zero-point (rule 5)"
    return None


def signed(file: GraphView, layer: NodeProto) -> str | None:
    """Rule 8: one type throughout, which int8 activations easily break on x86."""
    dequantizers = (file.dequantizer(name) for name in _data_inputs(layer))
    codes = [node.input[0] for node in dequantizers if node is not None]
    codes += [n.output[0] for n in file.readers(layer.output[0]) if n.op_type == "QuantizeLinear"]
    if not any(file.type_of(name) == TensorProto.INT8 for name in codes):
        return None
    return (
        "activations are int8; on x86 the runtime makes them uint8 only where a DequantizeLinear "
        "directly follows its QuantizeLinear, and the layer's types then differ (rule 8)"
    )


def changeable(file: GraphView, layer: NodeProto) -> str | None:
    """Constants that callers may change are none to the runtime."""
    dequantizers = [node for name in layer.input if (node := file.dequantizer(name))]
    behind, _ = _after_activation(file, layer)
    around = [*dequantizers, *file.readers(behind), layer]
    if file.changeable.isdisjoint(name for node in around for name in node.input):
        return None
    return (
        "initializers that it depends on are inputs of the graph, too, which callers may change: "
        "keep them out of these, so that they are constants"
    )


_CAUSES: tuple[Rule, ...] = (inputs, weights, output, gemm_output, bias, moved, changeable)
_SUSPICIONS: tuple[Rule, ...] = (rank, zero_point, signed)


# -- what the rules look at ------------------------------------------------------------------


def _product(file: GraphView, layer: NodeProto, name: str) -> str | None:
    """Attention's products: many alike, of values whose names tell a person nothing."""
    makers = [file.producers.get(one) for one in layer.input]
    computed = all(maker is not None and file.carries_data(maker) for maker in makers)
    if layer.op_type != "MatMul" or not computed:
        return None
    kind = file.producers[name].op_type
    return f"it multiplies two activations, of which {kind} leaves one in float (rule 1)"


def _data_inputs(layer: NodeProto) -> list[str]:
    return list(layer.input) if layer.op_type in _JOINS else [layer.input[0]]


def _unquantised(file: GraphView, layer: NodeProto) -> str | None:
    """What stands between a layer and the one quantizer it needs."""
    name, activation = _after_activation(file, layer)
    readers, called = file.readers(name), file.called(name)
    if name in file.outputs:
        return f"output {called!r} is a float output of the model (rule 1)"
    if len(readers) != 1:
        return f"output {called!r} has {len(readers)} readers, not one quantizer (rule 7)"
    (reader,) = readers
    if reader.op_type == "BatchNormalization":
        return f"output {called!r} goes into a BatchNormalization, which should be folded (rule 6)"
    if reader.op_type != "QuantizeLinear":
        return f"output {called!r} is not quantised but read by {reader.op_type} (rule 1)"
    return _cut(file, activation, reader)


def _activation_problem(file: GraphView, layer: NodeProto) -> str | None:
    """The activation's problem alone, for layers that can do without a quantizer."""
    name, activation = _after_activation(file, layer)
    readers = file.readers(name)
    quantized = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
    return _cut(file, activation, readers[0]) if quantized else None


def _after_activation(file: GraphView, layer: NodeProto) -> tuple[str, NodeProto | None]:
    """The value to be quantised and the activation that gives it, if there is one."""
    readers = file.readers(layer.output[0])
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        return readers[0].output[0], readers[0]
    return layer.output[0], None


def _cut(file: GraphView, activation: NodeProto | None, quantizer: NodeProto) -> str | None:
    """Rules 2 and 3: the quantizer's range lies inside the activation's, or it stays apart."""
    if activation is None:
        return None
    scale = file.constant(quantizer.input[1])
    zero = file.constant(quantizer.input[2]) if len(quantizer.input) > 2 else np.uint8(0)
    if scale is None or zero is None or zero.dtype.kind not in "iu":
        return None
    limits = np.iinfo(zero.dtype)
    if activation.op_type == "Relu":
        if np.all(zero == limits.min):
            return None
        return (
            f"ReLU before a quantizer with zero-point {zero.squeeze()}, not {limits.min} (rule 2)"
        )
    low, high = (float(np.max((q - np.float64(zero)) * scale)) for q in (limits.min, limits.max))
    bounds = _bounds(file, activation)
    if bounds is None or (bounds[0] <= low and high <= bounds[1]):
        return None
    return (
        f"Clip to [{bounds[0]:g}, {bounds[1]:g}] before a quantizer with the wider range "
        f"[{low:g}, {high:g}] (rule 3)"
    )


def _bounds(file: GraphView, clip: NodeProto) -> tuple[float, float] | None:
    """Where a Clip cuts, infinite where it does not, None if it is not known before it runs."""
    names = [*clip.input[1:], "", ""][:2]
    pairs = zip(names, _OPEN, strict=True)
    below, above = (file.constant(name) if name else nothing for name, nothing in pairs)
    return None if below is None or above is None else (below.item(), above.item())


def _float_bias(file: GraphView, layer: NodeProto) -> str | None:
    """Name of a float bias: a Gemm's third input, or what the only reader adds to a MatMul."""
    if layer.op_type == "Gemm":
        return _if_float(file, layer.input[2]) if len(layer.input) > 2 else None
    readers = file.readers(layer.output[0])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    others = [name for name in readers[0].input if name != layer.output[0]]
    return _if_float(file, others[0]) if others else None


def _if_float(file: GraphView, name: str) -> str | None:
    return name if file.dequantizer(name) is None else None


def _same(file: GraphView, before: list[str], after: list[str]) -> bool:
    """Whether two lists of constants hold the same numbers."""
    if before == after:
        return True
    pairs = [(file.constant(a), file.constant(b)) for a, b in zip(before, after, strict=False)]
    return len(before) == len(after) and all(
        a is not None and b is not None and np.array_equal(a.ravel(), b.ravel()) for a, b in pairs
    )

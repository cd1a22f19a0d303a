"""Which layers of a QDQ file a runtime runs in integers, and why the others do not.

The counts come from the graph that ONNX Runtime made of the file; the reasons from the file itself
(:mod:`sqakd_exporters.reasons`). Any QDQ file will do, whoever wrote it.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import NodeProto, TensorProto

from sqakd_deploy.exporting import Coverage, FloatFallback
from sqakd_exporters.reasons import reason
from sqakd_exporters.view import GraphView, attribute, text

FLOAT_LAYERS = {
    "FusedConv": "Conv",
    "NhwcFusedConv": "Conv",
    "FusedGemm": "Gemm",
    "FusedMatMul": "MatMul",
    "QuickGelu": "Mul",
}
"""What ONNX Runtime may call layers that stay in float; others have ONNX's names."""

INTEGER_LAYERS = {
    "QLinearConv": "Conv",
    "ConvInteger": "Conv",
    "ConvIntegerToFloat": "Conv",
    "QGemm": "Gemm",
    "QLinearMatMul": "MatMul",
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "QLinearAdd": "Add",
    "QLinearMul": "Mul",
    "QLinearSigmoid": "Sigmoid",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearConcat": "Concat",
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "NhwcMaxPool": "MaxPool",
}
"""Operators with integer kernels."""

_EITHER = ("Concat", "MaxPool", "Resize")  # run in whatever type they are given
_OTHER_INTEGER = "QLinear"  # what the names of ONNX Runtime's other integer operators begin with

_CODES = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_MOVES = (
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Pad"),
    *("Slice", "Split", "Gather", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"),
    *("ScatterElements", "ScatterND", "ReverseSequence", "Trilu", "Where", "Cast", "CastLike"),
    *("Identity", "Dropout", "ReorderInput", "ReorderOutput"),
)
_BOUNDS = ("Relu", "Clip")
_ABOUT = (  # of numbers, which are none
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor"),
    *("IsInf", "IsNaN", "Shape", "Size"),
)
NO_LAYERS = frozenset((*_CODES, *_MOVES, *_BOUNDS, *_ABOUT))
"""Operators that compute nothing of their own; all others are layers."""

_FLOATS = (
    *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE),
    None,  # not known, of a runtime's own operators
)

# What ONNX Runtime appends to the name of a node that it made of another.
_FROM_NODE = ("/MatMulAddFusion", "/QuickGeluFusion/")
_FROM_OUTPUT = ("_nchwc",)
_FROM_BATCH_NORM = "_bn_nchwc"  # a float BatchNormalization as a convolution

# What ONNX Runtime may have merged into a layer in front of it.
_MERGED = {
    "Add",
    "BatchNormalization",
    "Clip",
    "HardSigmoid",
    "LeakyRelu",
    "Mul",
    "Relu",
    "Sigmoid",
    "Tanh",
}


def measure(
    written: onnx.ModelProto, optimised: onnx.ModelProto, *, fusing: bool = True
) -> Coverage:
    """Compare a file with what a runtime made of it.

    Args:
        written: the file.
        optimised: the runtime's graph.
        fusing: whether the runtime was allowed to fuse anything.
    """
    file, made = GraphView(written), GraphView(optimised)
    integer: Counter[str] = Counter()
    floating: dict[str, FloatFallback] = {}  # by output: several nodes may stand for one layer
    seen: set[str] = set()
    for node in made.nodes:
        if not made.carries_data(node) or _adds_nothing(made, node):
            continue
        kind = _integer_kind(made, node)
        if kind in NO_LAYERS:
            continue
        if kind is not None:
            integer[kind] += 1
        elif _computes(made, node):
            for output, fallback in _explained(file, made, node, seen, fusing):
                floating.setdefault(output, fallback)
    unfolded = tuple(_restoring(made)) if fusing else ()
    total = integer + Counter(fallback.op_type for fallback in floating.values())
    fallbacks = tuple(floating.values())
    return Coverage(dict(integer), dict(total), fallbacks, _packed(file), unfolded)


def _integer_kind(made: GraphView, node: NodeProto) -> str | None:
    """What layer a node of the runtime's graph is in integers; None if it is none of these."""
    if node.op_type in INTEGER_LAYERS:
        return INTEGER_LAYERS[node.op_type]
    if node.op_type.startswith(_OTHER_INTEGER):
        return node.op_type.removeprefix(_OTHER_INTEGER)
    return node.op_type if node.op_type in _EITHER and made.is_integer(node.input[0]) else None


def _computes(graph: GraphView, node: NodeProto) -> bool:
    """Whether a node in float is a layer: no bound, nothing that prepares pixels or changes
    nothing."""
    data = graph.carried(node)
    if node.op_type in NO_LAYERS or not data or graph.type_of(data[0]) not in _FLOATS:
        return False
    if node.op_type in ("Max", "Min"):
        return len(data) > 1
    if node.op_type in ("Div", "Sub") and _is_of_pixels(graph, data[0]):
        return len(data) > 1
    source = graph.producers.get(data[0])
    return node.op_type != "Abs" or source is None or source.op_type != "Softmax"


def _is_of_pixels(graph: GraphView, name: str) -> bool:
    """Whether a value is the graph's input, as it is or on the way to being prepared."""
    while (maker := graph.producers.get(name)) is not None:
        if maker.op_type not in ("Cast", "DequantizeLinear", "Div", "Sub", "Transpose"):
            return False
        name = maker.input[0]
    return True


def _adds_nothing(made: GraphView, node: NodeProto) -> bool:
    """Whether it rounds codes anew (:mod:`sqakd_exporters.requantising`): no layer."""
    if node.op_type == "QLinearAdd":
        term = node.input[3:6]
    elif node.op_type == "Add" and (producer := made.dequantizer(node.input[1])) is not None:
        term = producer.input
    else:
        return False
    constants = [made.constant(name) for name in term]
    if len(constants) < 3 or any(value is None or value.size != 1 for value in constants):
        return False
    code, scale, zero_point = (float(value.item()) for value in constants if value is not None)
    return (code, scale, zero_point) == (0.0, 1.0, 0.0)


def _packed(file: GraphView) -> int:
    """Weights that are computed from smaller constants before they are dequantised; a bias that was
    stored in fewer bytes is but cast."""
    restoring = [
        node
        for node in file.constant_nodes()
        if node.op_type != "Cast" or attribute(node, "to", 0) != TensorProto.INT32
    ]
    computed = {name for node in restoring for name in node.output}
    return sum(
        node.op_type == "DequantizeLinear" and node.input[0] in computed for node in file.nodes
    )


def _restoring(made: GraphView) -> list[str]:
    """Nodes on constants that are left to every run, each with the layer that needs it.

    Float weights may well be dequantised there, which has its own reason.
    """
    nodes = [node for node in made.constant_nodes() if node.op_type != "DequantizeLinear"]
    return [f"{node.op_type} of {_needed_by(made, node)}" for node in nodes]


def _needed_by(made: GraphView, node: NodeProto) -> str:
    while not made.carries_data(node) and made.readers(node.output[0]):
        node = made.readers(node.output[0])[0]
    return node.name or node.output[0]


def _explained(
    file: GraphView, made: GraphView, node: NodeProto, seen: set[str], fusing: bool
) -> list[tuple[str, FloatFallback]]:
    """The float layers that a node of the runtime's graph stands for, by output, each with its
    reason."""
    layers = _layers_of(file, made, node, seen)
    if not layers:
        kind = FLOAT_LAYERS.get(node.op_type, node.op_type)
        why = "no such layer is in the file"
        return [(f"{node.op_type}({node.output[0]})", FloatFallback(node.name, kind, why))]
    because = (lambda layer: reason(file, layer)) if fusing else _without_fusions
    return [
        (one.output[0], FloatFallback(one.name or one.output[0], one.op_type, because(one)))
        for one in layers
    ]


def _layers_of(
    file: GraphView, made: GraphView, node: NodeProto, seen: set[str]
) -> list[NodeProto]:
    """The layers of the file that a float node was made of: one, and what was merged into it.

    Args:
        file: the file.
        made: the runtime's graph.
        node: of that.
        seen: outputs of the file's nodes that were looked at for others; these are added.
    """
    origin = origin_of(file, node)
    layers = [] if origin is None else [origin]
    if origin is not None and origin.op_type == "Conv":
        if len(node.input) > 3:  # computes conv(x) + input 3
            layers += [one for one in file.readers(origin.output[0]) if one.op_type == "Add"]
        layers += _activated(file, origin, text(node, "activation"))
    last = file.producers.get(node.output[0], origin)  # other layouts have values of their own
    if last is not None:
        parts = _parts(file, made, last, seen)
        layers += [one for one in parts if _computes(file, one) and not _folds(file, one)]
    else:
        layers += _inlined(file, made, node)
    return layers


def _parts(file: GraphView, made: GraphView, last: NodeProto, seen: set[str]) -> list[NodeProto]:
    """What the file has between one of its nodes and values that the runtime's graph has, too."""
    found = [last]
    for node in found:  # which grows
        for name in file.carried(node):
            maker = file.producers.get(name)
            if maker is None or name in made.producers or maker.op_type in _CODES:
                continue
            if maker.output[0] not in seen:
                seen.add(maker.output[0])
                found.append(maker)
    return found[::-1]


def _folds(file: GraphView, node: NodeProto) -> bool:
    """Whether a layer in front of it takes it up in its constants."""
    affine = node.op_type in ("Add", "Sub", "Mul", "Div") and len(file.carried(node)) == 1
    return affine or node.op_type == "BatchNormalization"


def _activated(file: GraphView, layer: NodeProto, function: str) -> list[NodeProto]:
    """What of the file is the function that the runtime computes with a layer."""
    kinds = ("HardSigmoid", "HardSwish", "Mul") if function == "HardSwish" else (function,)
    readers = file.readers(layer.output[0]) if function else []
    found = [node for node in readers if node.op_type in kinds and _computes(file, node)]
    if found or len(readers) != 1 or readers[0].op_type not in _MERGED:
        return found
    return _activated(file, readers[0], function)


def _inlined(file: GraphView, made: GraphView, node: NodeProto) -> list[NodeProto]:
    """The layer that a node was made of which the runtime knows as several others."""
    while node.output[0] not in file.producers:
        readers = made.readers(node.output[0])
        if not readers:
            return []
        node = readers[0]
    last = file.producers[node.output[0]]
    return [last] if last.op_type != node.op_type and _computes(file, last) else []


def _without_fusions(layer: NodeProto) -> str:
    return "the session runs without optimisations, which fuse integer kernels"


def origin_of(file: GraphView, node: NodeProto) -> NodeProto | None:
    """The layer of the file that a node of the runtime's graph was made of.

    Names are tried first, then outputs: a fused node has the output of the last node in it.
    """
    kind = FLOAT_LAYERS.get(node.op_type, node.op_type)
    kinds = ("Gemm", "MatMul") if kind == "Gemm" else (kind,)
    norm = file.producers.get(node.name.removesuffix(_FROM_BATCH_NORM))
    if node.name.endswith(_FROM_BATCH_NORM) and norm and norm.op_type == "BatchNormalization":
        return norm
    candidates = [other for other in file.nodes if node.name and other.name == node.name]
    for suffix in _FROM_NODE:
        stem = node.name.removesuffix(suffix)
        candidates += [other for other in file.nodes if stem and other.name == stem]
    for suffix in _FROM_OUTPUT:
        candidates.append(file.producers.get(node.name.removesuffix(suffix), NodeProto()))
    candidates += [file.producers[name] for name in node.output if name in file.producers]
    traced = (_first_of(file, candidate, kinds) for candidate in candidates)
    return next((layer for layer in traced if layer is not None), None)


def _first_of(file: GraphView, node: NodeProto, kinds: tuple[str, ...]) -> NodeProto | None:
    """The node, or the one in front of what may have been merged into it, of one of the kinds."""
    if node.op_type in kinds:
        return node
    if node.op_type not in _MERGED:
        return None
    producers = (file.producers[name] for name in node.input if name in file.producers)
    traced = (_first_of(file, producer, kinds) for producer in producers)
    return next((layer for layer in traced if layer is not None), None)

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
from sqakd_exporters.view import GraphView, attribute

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
    "Mul": "Mul",
    "QuickGelu": "Mul",
    "Sigmoid": "Sigmoid",
    "HardSigmoid": "HardSigmoid",
    "Elu": "Elu",
    "Gelu": "Gelu",
    "PRelu": "PRelu",
    "Reciprocal": "Reciprocal",
    "Softplus": "Softplus",
    "Sqrt": "Sqrt",
    "LeakyRelu": "LeakyRelu",
    "BatchNormalization": "BatchNormalization",
    "LayerNormalization": "LayerNormalization",
    "LogSoftmax": "LogSoftmax",
    "Softmax": "Softmax",
    "Tanh": "Tanh",
    "Div": "Div",
    "ReduceL2": "ReduceL2",
    "ReduceMean": "ReduceMean",
    "ReduceSumSquare": "ReduceSumSquare",
    "Resize": "Resize",
}
"""Operators that count, by what ONNX Runtime may call them when they stay in float."""

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

# What ONNX Runtime appends to the name of a node that it made of another.
_FROM_NODE = ("/MatMulAddFusion",)
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
    floating: Counter[str] = Counter()
    fallbacks = []
    for node in made.nodes:
        if not made.carries_data(node) or _adds_nothing(made, node):
            continue
        if node.op_type in INTEGER_LAYERS or _on_integers(made, node):
            integer[INTEGER_LAYERS.get(node.op_type, node.op_type)] += 1
        elif node.op_type in FLOAT_LAYERS and not _prepares(made, node):
            for fallback in _explained(file, node, fusing):
                floating[fallback.op_type] += 1
                fallbacks.append(fallback)
    unfolded = tuple(_restoring(made)) if fusing else ()
    total = integer + floating
    return Coverage(dict(integer), dict(total), tuple(fallbacks), _packed(file), unfolded)


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


def _prepares(made: GraphView, node: NodeProto) -> bool:
    """Whether it divides by a constant, as the preparing of raw pixels does: no layer."""
    return node.op_type == "Div" and made.constant(node.input[1]) is not None


def _on_integers(made: GraphView, node: NodeProto) -> bool:
    return node.op_type in _EITHER and made.is_integer(node.input[0])


def _explained(file: GraphView, node: NodeProto, fusing: bool) -> list[FloatFallback]:
    """The float layers that one node of the runtime's graph stands for, each with its reason."""
    origin = origin_of(file, node)
    if origin is None:
        kind = FLOAT_LAYERS[node.op_type]
        return [FloatFallback(node.name, kind, "no such layer is in the file")]
    layers = [origin]
    if FLOAT_LAYERS[node.op_type] == "Conv" and len(node.input) > 3:  # computes conv(x) + input 3
        layers += [reader for reader in file.readers(origin.output[0]) if reader.op_type == "Add"]
    because = (lambda layer: reason(file, layer)) if fusing else _without_fusions
    return [
        FloatFallback(layer.name or layer.output[0], layer.op_type, because(layer))
        for layer in layers
    ]


def _without_fusions(layer: NodeProto) -> str:
    return "the session runs without optimisations, which fuse integer kernels"


def origin_of(file: GraphView, node: NodeProto) -> NodeProto | None:
    """The layer of the file that a node of the runtime's graph was made of.

    Names are tried first, then outputs: a fused node has the output of the last node in it.
    """
    kinds = ("Gemm", "MatMul") if "Gemm" in node.op_type else (FLOAT_LAYERS[node.op_type],)
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

"""Which layers OpenVINO runs in integers, and why it does not run the others so.

The layers are those of the model as read; how each runs is said by the graph that OpenVINO made of
it (its *runtime model*), whose nodes list the layers they stand for. Rule numbers are those of
``docs/runtime-rules.md``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import openvino

from sqakd_deploy.exporting import Coverage, FloatFallback
from sqakd_exporters.floats import GATES, WITHOUT_KERNEL

LAYERS = {
    "Convolution": "Conv",
    "GroupConvolution": "Conv",
    "ConvolutionBackpropData": "ConvTranspose",
    "GroupConvolutionBackpropData": "ConvTranspose",
    "MatMul": "Gemm",
    "Add": "Add",
    "Concat": "Concat",
    "AvgPool": "AveragePool",
    "ReduceMean": "GlobalAveragePool",
    "MaxPool": "MaxPool",
    "Multiply": "Mul",
    "Sigmoid": "Sigmoid",
    "HardSigmoid": "HardSigmoid",
    "Elu": "Elu",
    "Gelu": "Gelu",
    "Mish": "Mish",
    "SoftPlus": "Softplus",
    "Sqrt": "Sqrt",
    "PRelu": "LeakyRelu",
    "LogSoftmax": "LogSoftmax",
    "Softmax": "Softmax",
    "Tanh": "Tanh",
    "MVN": "LayerNormalization",
    "Divide": "Div",
    "ReduceL2": "ReduceL2",
    "Interpolate": "Resize",
}
"""OpenVINO's operators that count, by ONNX's names for them."""

_INTEGERS = ("u8", "i8")
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm")
_OF_TWO = ("Add", "Multiply", "Divide")  # with a constant they are a bias or a scale, and no layer
_WITHOUT_KERNEL = (*WITHOUT_KERNEL, "Mish", "Resize", "Sigmoid", "Softmax")
_PART_OF_NORM = re.compile(r"(MVN|Multiply)_\d+")  # names that OpenVINO makes up
_MERGED_BIAS = "/WithoutBiases"  # what the ONNX reader calls a layer whose bias is a node apart

# What stands between a layer and what quantised its input.
_TRANSPARENT = {
    "Broadcast",
    "Clamp",
    "Convert",
    "Gather",
    "MaxPool",
    "Maximum",
    "Minimum",
    "Multiply",
    "Pad",
    "Reshape",
    "ShuffleChannels",
    "Slice",
    "Squeeze",
    "StridedSlice",
    "Subtract",
    "Transpose",
    "Unsqueeze",
}


def measure(written: openvino.Model, executed: openvino.Model, *, fusing: bool = True) -> Coverage:
    """Compare a model with what OpenVINO made of it.

    Args:
        written: the model as read.
        executed: its runtime model.
        fusing: whether the low-precision transformations were allowed.
    """
    run_by = _run_by(executed)
    integer: Counter[str] = Counter()
    total: Counter[str] = Counter()
    fallbacks = []
    for layer in _layers(written):
        kind = LAYERS[layer.get_type_name()]
        total[kind] += 1
        if _runs_in_integers(_executed(layer, run_by)):
            integer[kind] += 1
        else:
            fallbacks.append(FloatFallback(_called(layer), kind, _reason(layer, kind, fusing)))
    packed = sum(_has_packed_weights(layer) for layer in _layers(written))
    return Coverage(dict(integer), dict(total), tuple(fallbacks), packed)


def _layers(written: openvino.Model) -> list[openvino.Node]:
    """Layers on the data's way; a bias is none, nor a pool over single pixels."""
    data = {node.get_friendly_name() for node in written.get_parameters()}
    found = []
    for node in written.get_ordered_ops():
        inputs = [v.get_node().get_friendly_name() for v in node.input_values()]
        carried = [name in data for name in inputs]
        kind = node.get_type_name()
        if kind == "ShapeOf" or not any(carried):
            continue
        data.add(node.get_friendly_name())
        constant = kind in _OF_TWO and not all(carried)
        if kind in LAYERS and not constant and not _is_fence(node):
            found.append(node)
    return found


def _is_fence(node: openvino.Node) -> bool:
    return node.get_type_name() == "MaxPool" and set(node.get_attributes()["kernel"]) == {1}


def _run_by(executed: openvino.Model) -> Callable[[str], openvino.Node | None]:
    """A look-up: the executed node that stands for a layer of that name.

    A layer that the transformations moved has their suffix behind a slash.
    """
    nodes = {
        name: node
        for node in executed.get_ordered_ops()
        for name in _told(node, "originalLayersNames").split(",")
        if name
    }

    def find(layer: str) -> openvino.Node | None:
        if layer in nodes:
            return nodes[layer]
        return next((node for name, node in nodes.items() if name.startswith(f"{layer}/")), None)

    return find


def _executed(
    layer: openvino.Node, run_by: Callable[[str], openvino.Node | None]
) -> openvino.Node | None:
    """What stands for a layer; ``x · gate(x)`` as one operator has the name of the product.

    A SiLU may so be a part of the convolution before it, gate and all.
    """
    found = run_by(layer.get_friendly_name())
    if found is not None or layer.get_type_name() not in GATES:
        return found
    products = [node for node in _readers(layer) if _gate(node) is not None]
    return run_by(products[0].get_friendly_name()) if len(products) == 1 else None


def _readers(node: openvino.Node) -> list[openvino.Node]:
    return [value.get_node() for out in node.outputs() for value in out.get_target_inputs()]


def _called(layer: openvino.Node) -> str:
    """What the file calls a layer; OpenVINO takes a norm apart, and its last part has the name."""
    node = layer
    while _PART_OF_NORM.fullmatch(node.get_friendly_name()):
        readers = _readers(node)
        if len(readers) != 1 or readers[0].get_type_name() not in _OF_TWO:
            return layer.get_friendly_name()
        (node,) = readers
    return node.get_friendly_name().removesuffix(_MERGED_BIAS)


def _told(node: openvino.Node, key: str) -> str:
    info = node.get_rt_info()
    return str(info[key].value) if key in info else ""


def _runs_in_integers(node: openvino.Node | None) -> bool:
    """Both the data and the kernel are 8-bit: ``u8`` and ``brgconv_avx512_I8``, say."""
    if node is None:
        return False
    kernel = _told(node, "primitiveType")
    return _told(node, "runtimePrecision") in _INTEGERS and kernel.upper().endswith("_I8")


def _reason(layer: openvino.Node, kind: str, fusing: bool) -> str:
    if not fusing:
        return "the session runs without low-precision transformations, which make integer kernels"
    if kind in _WITHOUT_KERNEL:
        return f"OpenVINO has no integer {kind} of its own"
    inputs = layer.input_values()
    gate = _gate(layer)
    if gate is not None:
        return f"it is part of a {gate}, for which OpenVINO has no integer kernel of its own"
    weighted = kind in _WITH_WEIGHTS and _is_constant(inputs[1])
    for value in inputs[:1] if weighted or kind not in ("Add", "Mul", "Concat", "Gemm") else inputs:
        if not _is_quantized(value):
            source = value.get_node().get_friendly_name()
            return f"input {source!r} is not quantised (rule O1)"
    if weighted and not (_has_packed_weights(layer) or _has_integer_weights(inputs[1])):
        return "weights are not 8-bit integers (rule O1)"
    if kind == "AveragePool" and layer.get_attributes().get("rounding_type") != "floor":
        return "averages read unrounded, or of windows in ceil mode, are float (rules O4, O19)"
    return "OpenVINO chose a float kernel, though input and weights are integers as rule O1 asks"


def _gate(product: openvino.Node) -> str | None:
    """Of what ``x · gate(x)`` a node is the product, if it is."""
    if product.get_type_name() != "Multiply":
        return None
    sources = [value.get_node() for value in product.input_values()]
    for gate, factor in (sources, sources[::-1]):
        name = GATES.get(gate.get_type_name())
        if name and gate.input_values()[0].get_node() == factor:
            return name
    return None


def _is_quantized(value: openvino.Output) -> bool:
    return _reaches(value, "FakeQuantize") is not None


def _is_constant(value: openvino.Output) -> bool:
    """Whether it depends on no input of the model."""
    waiting, seen = [value.get_node()], set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return False
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            waiting += [source.get_node() for source in node.input_values()]
    return True


def _has_packed_weights(layer: openvino.Node) -> bool:
    """Whether the file holds its weights in less than a byte each: as 4 bits, or as what a table
    restores."""
    if LAYERS[layer.get_type_name()] not in _WITH_WEIGHTS:
        return False
    weights = layer.input_values()[1]
    constant = _reaches(weights, "Constant")
    if constant is None or _reaches(weights, "Gather") is not None:  # a sum of tables, or one
        return _is_constant(weights)
    return bool(constant.get_element_type().bitwidth < 8)


def _has_integer_weights(value: openvino.Output) -> bool:
    constant = _reaches(value, "Constant")
    return constant is not None and constant.get_element_type().get_type_name() in _INTEGERS


def _reaches(value: openvino.Output, kind: str) -> openvino.Node | None:
    """The node of a kind that a value comes from, through what changes no integer."""
    node = value.get_node()
    while node.get_type_name() in _TRANSPARENT and node.get_type_name() != kind:
        sources = [source.get_node() for source in node.input_values()]
        # Minimum and Maximum may have their bound in front
        node = next((s for s in sources if s.get_type_name() != "Constant"), sources[0])
    return node if node.get_type_name() == kind else None

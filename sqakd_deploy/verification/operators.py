"""Operators of a file that its student has not, or has as others.

What one does may show on no image at hand: a branch that none of them takes, a slope where nothing
is negative. So it is not asked what an operator does. It is the student's, by its name; or a part
of what a node of the student is written as; or of a kind that changes no number.

Bounds, terms and factors without such a name may be the student's in another form, and have rules
of their own (:mod:`~sqakd_deploy.verification.bounds`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto, helper

from sqakd_deploy import graph as ir
from sqakd_deploy.verification.bounds import place
from sqakd_deploy.verification.constants import Difference
from sqakd_deploy.verification.flow import has_graph
from sqakd_deploy.verification.kinds import BOUNDING, NEARLY_NOTHING, WITH_TERM, is_part
from sqakd_deploy.verification.onnx_layers import OnnxFile

Operators: TypeAlias = Mapping[str, str]
"""What each node of a student is, by its name."""

_DOMAINS = ("", "ai.onnx", "qonnx.custom_op.general")

_IDLE = ("DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Change no number; readers' scales and zero-points are compared as constants."""

_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Activation elu": ("Elu",),
        "Activation gelu": ("Gelu",),
        "Activation gelu_tanh": ("Gelu",),
        "Activation hard_sigmoid": ("HardSigmoid",),
        "Activation hard_swish": ("Mul",),
        "Activation leaky_relu": ("LeakyRelu",),
        "Activation mish": ("Mul",),
        "Activation reciprocal": ("Reciprocal",),
        "Activation sigmoid": ("Sigmoid",),
        "Activation silu": ("Mul",),
        "Activation softplus": ("Softplus",),
        "Activation sqrt": ("Sqrt",),
        "Activation tanh": ("Tanh",),
        "Add": ("Add",),
        "AveragePool": ("AveragePool",),
        "Clip": ("Clip", "Relu"),
        "Concat": ("Concat",),
        "Conv": ("Conv",),
        "Divide": ("Div",),
        "GlobalAveragePool": ("AveragePool", "GlobalAveragePool", "ReduceMean"),
        "LayerNorm": ("LayerNormalization",),
        "Linear": ("Gemm", "MatMul"),
        "LogSoftmax": ("LogSoftmax",),
        "MatMul": ("MatMul",),
        "MaxPool": ("MaxPool",),
        "Mul": ("Mul",),
        "ParametricRelu": ("PRelu",),
        "Quantize": ("BipolarQuant", "IntQuant", "Quant", "QuantizeLinear"),
        "Reduce length": ("ReduceL2",),
        "Reduce mean": ("ReduceMean",),
        "Reduce squares": ("ReduceSumSquare",),
        "Resize": ("Resize",),
        "Softmax": ("Softmax",),
        "UnitLength": ("Div",),
    }
)
"""What nodes are written as, where all targets write them alike."""


def operators_of(graph: ir.IntegerGraph) -> dict[str, str]:
    """What each node of a graph is, by its name."""
    return {node.name: _kind(node) for node in graph.nodes}


def _kind(node: ir.Node) -> str:
    if isinstance(node, (ir.Activation, ir.Reduce)):
        return f"{type(node).__name__} {node.function}"
    if isinstance(node, ir.Softmax) and node.log:
        return "LogSoftmax"
    return type(node).__name__


def other_operators(file: OnnxFile, known: Operators) -> Iterator[Difference]:
    """Operators on the images' way that the student has not, or has as others.

    Args:
        file: whose.
        known: what the student's are; without any, only operators that nothing here could follow
            are found.
    """
    local = {(function.domain, function.name) for function in file.model.functions}
    for node in file.nodes:
        if not any(map(file.depends, node.output)):
            continue
        name, kind = node.name or node.output[0], known.get(node.name)
        if node.domain not in _DOMAINS or (node.domain, node.op_type) in local:
            what = f"the student has no {node.domain}::{node.op_type} {place(file, node)}"
            yield Difference(name, "layer", 1, 1, what)
        elif has_graph(node):
            what = f"the student has no {node.op_type} with graphs of its own {place(file, node)}"
            yield Difference(name, "layer", 1, 1, what)
        elif kind is not None:
            wanted = _TYPES.get(kind, (node.op_type,))
            if node.op_type not in wanted:
                what = f"{node.op_type} in the file, {' or '.join(wanted)} in the student"
                yield Difference(name, "operator", 1, 1, what)
        elif known and not (_has_own_rules(node) or _is_idle(file, node) or is_part(node, known)):
            what = f"the student has no {node.op_type} {place(file, node)}"
            yield Difference(name, "layer", 1, 1, what)


def _has_own_rules(node: NodeProto) -> bool:
    return node.op_type in (*BOUNDING, *NEARLY_NOTHING, *WITH_TERM)


def _is_idle(file: OnnxFile, node: NodeProto) -> bool:
    """Whether it changes no number: codes may become reals, but not the other way."""
    if node.op_type == "Cast":
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return given.get("to") in (TensorProto.FLOAT, TensorProto.DOUBLE)
    if node.op_type == "Dropout":  # which runs as one only if its third input says so
        training = file.constant(node.input[2]) if len(node.input) > 2 else np.array(False)
        return training is not None and not training
    if node.op_type == "Abs":
        before = file.producer(node.input[0])
        return before is not None and before.op_type == "Softmax"
    return node.op_type in _IDLE

"""Constants that a file computes from others, as those of packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper
from onnx.reference import ReferenceEvaluator

from sqakd_deploy.errors import ExportError
from sqakd_deploy.verification.flow import has_graph


def computed_constants(model: ModelProto, path: Path) -> dict[str, NDArray[Any]]:
    """Values that nodes compute from initializers alone, but for dequantised ones.

    They are computed with onnx's reference evaluator, not with what wrote them or what runs them.

    Args:
        model: not changed.
        path: of its file, for errors.

    Raises:
        ExportError: if the evaluator fails.
    """
    nodes = _constant_nodes(model)
    if not nodes:
        return {}
    names = [name for node in nodes for name in node.output]
    needed = {name for node in nodes for name in node.input}
    part = helper.make_model(
        helper.make_graph(
            nodes,
            "constants",
            [],
            [onnx.ValueInfoProto(name=name) for name in names],
            [tensor for tensor in model.graph.initializer if tensor.name in needed],
        ),
        opset_imports=model.opset_import,
    )
    try:
        results = ReferenceEvaluator(part).run(None, {})
    except Exception as error:  # whatever a stranger's node raises in onnx's evaluator
        raise ExportError(f"cannot compute the constants of {path}: {error}") from error
    return dict(zip(names, results, strict=True))


def _constant_nodes(model: ModelProto) -> list[NodeProto]:
    known, found = {tensor.name for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        constant = known.issuperset(inputs) if inputs else node.op_type == "Constant"
        plain = not (node.domain or has_graph(node)) and node.op_type != "DequantizeLinear"
        if constant and plain:
            known.update(node.output)
            found.append(node)
    return found

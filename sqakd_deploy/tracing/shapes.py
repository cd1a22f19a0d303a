"""What a node of a traced graph gives: its noted shape, and its value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

SIZE = "size"  # in a node's meta: its value, where that is no tensor


def is_size(node: fx.Node) -> bool:
    """Whether the node computes a size: an integer or a tuple of integers."""
    return SIZE in node.meta


def noted_shape(node: object) -> tuple[int, ...] | None:
    """Shape of a node's tensor, with the example's batch; None where its value is no tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


def noted_type(node: object) -> torch.dtype | None:
    """Type of a node's tensor; None where its value is no tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return meta.dtype if isinstance(meta, TensorMetadata) else None


def attribute(model: nn.Module, path: str) -> Any:
    """The parameter, buffer or other value at a path."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def run(model: nn.Module, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """A node's value, from those of the nodes that it reads; not of a placeholder."""
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    target: Any = node.target
    if node.op == "get_attr":
        return attribute(model, target)
    if node.op == "call_module":
        return model.get_submodule(target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


class Recorder(fx.Interpreter):
    """Runs a traced model and keeps the values of some of its nodes, by their names."""

    def __init__(self, traced: Any, names: Collection[str]) -> None:
        super().__init__(traced)
        self.names = names
        self.values: dict[str, Any] = {}
        self.extra_traceback = False  # which would replace an error's message

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = result
        return result

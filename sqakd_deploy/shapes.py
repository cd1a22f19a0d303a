"""Shapes that were noted in a traced graph."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata


def noted_shape(node: object) -> tuple[int, ...] | None:
    """Shape of a node's tensor, with the example's batch; None where its value is no tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None

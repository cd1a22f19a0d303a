"""What is known of a tensor's values without running the model: their sign, and a bound."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sqakd_deploy import graph as ir
from sqakd_deploy.lowering.meaning import Op
from sqakd_deploy.tracing.trace import tensor_inputs_through

POOLS = (ir.AveragePool, ir.GlobalAveragePool)

_NEVER_NEGATIVE = ("length", "softplus", "sqrt", "squares")


def signed(ops: Mapping[fx.Node, Op], node: fx.Node) -> bool:
    """Whether a node's tensor may take negative values.

    Args:
        ops: the meaning of each call of the graph.
        node: of that graph.
    """
    if node not in ops:
        return True
    op = ops[node]
    if issubclass(op.kind, ir.Clip):
        return bool(op.attributes["low"] < 0)
    if _bounded(op):
        return False
    if op.attributes.get("function") in _NEVER_NEGATIVE or op.attributes.get("slope", 1) < 0:
        return False
    keeps_sign = (ir.Add, ir.Mul, ir.Concat, ir.Divide, ir.Reduce, ir.Resize, *POOLS)
    keeps = issubclass(op.kind, keeps_sign) or op.attributes.get("function") == "reciprocal"
    if op.passes_through or keeps:
        return any(signed(ops, source) for source in tensor_inputs_through(node))
    return True


def limit(ops: Mapping[fx.Node, Op], node: fx.Node) -> float | None:
    """The largest value of a node's tensor, where an activation bounds it and none is negative."""
    if node not in ops:
        return None
    op = ops[node]
    if issubclass(op.kind, ir.Clip):
        high = op.attributes["high"]
        bounded = high is not None and high > 0 and op.attributes["low"] >= 0
        return float(high) if bounded else None
    if _bounded(op):
        return 1.0
    if op.passes_through:
        return limit(ops, tensor_inputs_through(node)[0])
    return None


def _bounded(op: Op) -> bool:
    """Its values lie between 0 and 1."""
    sigmoids = ("sigmoid", "hard_sigmoid")
    chances = issubclass(op.kind, ir.Softmax) and not op.attributes["log"]
    return chances or op.attributes.get("function") in sigmoids

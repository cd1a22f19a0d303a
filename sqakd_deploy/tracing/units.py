"""GELU that a model writes out, as the operator that it is.

Models write it in many orders, of products by a half and quotients by a root of two. What is
between a tensor and the last product is not compared with any of them: it is computed, on numbers,
and is GELU where all of them say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sqakd_deploy.tracing.calls import call
from sqakd_deploy.tracing.shapes import attribute, noted_shape, run

_CURVES = ("erf", "special_erf", "tanh")
_STEPS = (*_CURVES, "add", "sub", "mul", "div", "truediv", "true_divide", "neg", "pow", "square")
_FAR = 16  # nodes that are looked at on either side: more than any way to write it has
_NUMBERS = torch.linspace(-6, 6, 241, dtype=torch.float64)
_SAME = 1e-6  # far below the 5e-4 between the exact one and that by tanh


def write_gelu(traced: fx.GraphModule) -> None:
    """Write ``x · Φ(x)`` by erf, and its approximation by tanh, as ``F.gelu``.

    Args:
        traced: with the shapes of its tensors; changed in place.
    """
    for curve in [node for node in traced.graph.nodes if _name(node) in _CURVES]:
        for start in _reached(curve, lambda node: node.all_input_nodes):
            found = next(_ends(curve, start), None)
            if found is not None:
                end, approximate = found
                with traced.graph.inserting_before(end):
                    made = call(end, F.gelu, start, approximate=approximate)
                made.meta["tensor_meta"] = end.meta["tensor_meta"]
                end.replace_all_uses_with(made)
                break


def _name(node: fx.Node) -> str:
    """Of a function or method; none of any other node."""
    called = node.op in ("call_function", "call_method")
    target = getattr(node.target, "__name__", node.target) if called else ""
    return str(target)


def _reached(node: fx.Node, beside: Any) -> list[fx.Node]:
    """Nodes on one side of a node, the nearest first, as far as elementwise steps lead."""
    found: list[fx.Node] = []
    left = list(beside(node))
    while left and len(found) < _FAR:
        here = left.pop(0)
        if here not in found:
            found.append(here)
            left += beside(here) if _name(here) in _STEPS else ()
    return found


def _ends(curve: fx.Node, start: fx.Node) -> Iterator[tuple[fx.Node, str]]:
    """Nodes behind a curve that are GELU of a tensor, with what ``F.gelu`` calls it."""
    for end in _reached(curve, lambda node: list(node.users)):
        same = noted_shape(start) is not None and noted_shape(end) == noted_shape(start)
        computed = _computed(end, {start: _NUMBERS}) if same and _name(end) in _STEPS else None
        if computed is None or computed.shape != _NUMBERS.shape:
            continue
        for approximate in ("none", "tanh"):
            wanted = F.gelu(_NUMBERS, approximate=approximate)
            if bool((computed - wanted).abs().max() < _SAME):
                yield end, approximate


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """A node's value from those of others; None where it depends on more than those.

    Args:
        node: to compute.
        values: that are known; those computed on the way are added, so that each is once.
    """
    if node not in values:
        values[node] = _compute(node, values)
    return values[node]


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    owner: Any = node.graph.owning_module
    if node.op == "get_attr":
        held = attribute(owner, str(node.target))
        number = isinstance(held, Tensor) and held.numel() == 1
        return held.detach().double().reshape(()) if number else None
    if _name(node) not in _STEPS:
        return None
    known = {source: _computed(source, values) for source in node.all_input_nodes}
    return None if any(value is None for value in known.values()) else run(owner, node, known)

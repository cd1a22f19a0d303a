"""Calls in a traced graph: their arguments, and new ones beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

Rewriter = Callable[[fx.Node], "fx.Node | None"]
"""Writes a call in other operators; None leaves it as it is."""


def module_of(node: fx.Node) -> nn.Module:
    """The module that a node calls."""
    owner = node.graph.owning_module
    assert owner is not None  # a traced model's graph
    return owner.get_submodule(str(node.target))


def call(like: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call at the same line of the model's code."""
    graph = like.graph
    make = graph.call_method if isinstance(target, str) else graph.call_function
    node = make(target, args, kwargs)  # type: ignore[arg-type]
    node.stack_trace = like.stack_trace
    return node


def with_input_first(graph: fx.Graph) -> None:
    """Give what calls read as ``input=x`` by position, where the readers of calls look for it."""
    for node in graph.nodes:
        if not node.args and "input" in node.kwargs:
            rest = dict(node.kwargs)
            node.args = (rest.pop("input"),)
            node.kwargs = rest


def argument(node: fx.Node, at: int, name: str, default: Any) -> Any:
    """An argument of a call, given by position or name."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns, of which torch takes one number for both."""
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


def permuted(like: fx.Node, source: fx.Node, order: Iterable[int]) -> fx.Node:
    """The tensor with its axes in this order; itself, if they are."""
    axes = list(order)
    return source if axes == sorted(axes) else call(like, "permute", source, *axes)

"""The vocabulary in which :mod:`sqakd_deploy.lowering.ops` says what an operator means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.tracing.trace import known


class Identity(ir.Node):
    """Passes its input on (dropout in evaluation, ``contiguous``)."""


class Scalar(ir.Node):
    """Computes no tensor (a size)."""


class Tuple(ir.Node):
    """Cuts a tensor into several; its readers become slices."""


@dataclass(frozen=True)
class Op:
    """An operator.

    Attributes:
        kind: the graph node that it becomes.
        attributes: of that node.
    """

    kind: type[ir.Node]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passes_through(self) -> bool:
        """Its output holds values of its input only, and zeros."""
        return issubclass(self.kind, (*ir.DATA_MOVEMENT, Identity, Tuple))

    @property
    def takes_parameters(self) -> bool:
        """It may read bare parameters, which it holds as constants."""
        return issubclass(self.kind, (ir.FloatNode, ir.ChannelAffine, Scalar))


Reader = Callable[[fx.Node, nn.Module | None], "Op | None"]


def simple(kind: type[ir.Node], **attributes: Any) -> Reader:
    """A reader of operators that always mean the same."""
    return lambda node, module: Op(kind, attributes)


def setting(node: fx.Node, module: nn.Module | None, name: str, at: int, default: Any) -> Any:
    """An attribute of the module, or an argument of the call by name or position."""
    if module is not None:
        return getattr(module, name)
    if name in node.kwargs:
        return known(node.kwargs[name])
    return known(node.args[at]) if len(node.args) > at else default

"""In-place operators of a traced model, written out of place with the same meaning.

They would overwrite tensors that quantizers keep for their gradient. After ``y = f_(x)`` the name
``x`` means ``y`` as well, in everything that runs later; a statement ``f_(x)`` on its own has no
other reader, and would be dropped as dead code.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx


def set_item_(x: Tensor, index: Any, value: Any) -> Tensor:
    """``x[index] = value``, and the tensor."""
    x[index] = value
    return x


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of the tensor, with that entry."""
    return set_item_(x.clone(), index, value)


_FUNCTIONS: Mapping[Any, Any] = {
    set_item_: with_item,
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    torch.clamp_: torch.clamp,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
}
_NAMES = ("add", "mul", "sub", "div", "neg", "sigmoid", "softmax", "relu", "clamp", "clamp_min")
_METHODS = {f"{name}_": name for name in _NAMES}


def write_out_of_place(traced: fx.GraphModule) -> None:
    """Replace in-place operators; one without a counterpart keeps its name, but has its readers.

    Args:
        traced: changed in place, and so are its modules' ``inplace`` flags.
    """
    for node in traced.graph.nodes:
        if _is_in_place(node, traced):
            _hand_over(node)
        node.target = _FUNCTIONS.get(node.target, node.target)
        if node.op == "call_method":
            node.target = _METHODS.get(node.target, node.target)
        if "inplace" in node.kwargs:
            node.kwargs = {**node.kwargs, "inplace": False}
    for module in traced.modules():
        if "inplace" in vars(module):
            module.inplace = False  # type: ignore[assignment]


def _is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return _ends_in_place(str(node.target))
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    augmented = getattr(operator, name, None) is node.target and name in _AUGMENTED
    return augmented or _ends_in_place(name) or bool(node.kwargs.get("inplace"))


_AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod")


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _hand_over(node: fx.Node) -> None:
    """Everything that runs after ``node`` and reads its argument reads its result instead."""
    changed = node.args[0] if node.args else None
    if isinstance(changed, fx.Node):
        changed.replace_all_uses_with(node, lambda user: node < user)

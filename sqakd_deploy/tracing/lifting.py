"""Layers and constants that a model's code spells out, as modules and parameters.

``F.conv2d(x, self.weight)`` in a class of one's own is the convolution that ``nn.Conv2d`` is, and
what is computed from parameters alone (a standardised weight, a gain made ``(1, C, 1, 1)``, a table
of relative positions) is a parameter. Both are how timm's models are written, and many others.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sqakd_deploy.errors import ModelError
from sqakd_deploy.tracing.shapes import attribute, noted_shape, run

# Of a constant's making: they read no tensor, and give the same each time.
_MAKERS = (torch.arange, torch.zeros, torch.ones, torch.full, torch.linspace, torch.tensor)


def lift_constants(traced: fx.GraphModule) -> None:
    """Replace what depends on no image by a parameter of its own, or a buffer if none was in it.

    The student learns the value itself: a standardised weight is standardised once.

    Args:
        traced: changed in place; its modules must be in evaluation mode.
    """
    values: dict[fx.Node, Any] = {}
    learned: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if _is_constant(node, values):
            with torch.no_grad():
                values[node] = run(traced, node, values)
            if has_parameters(traced, node, values[node]) or learned & {*node.all_input_nodes}:
                learned.add(node)
    for node, value in values.items():
        used = any(user not in values for user in node.users)
        if node.op == "get_attr" or not used or not isinstance(value, Tensor):
            continue
        name = free_name(traced, f"{node.name}_constant")
        register(traced, name, value, learned=node in learned)
        with traced.graph.inserting_before(node):
            read = traced.graph.get_attr(name)
        read.stack_trace = node.stack_trace
        node.replace_all_uses_with(read, lambda user: user not in values)


def _is_constant(node: fx.Node, known: Mapping[fx.Node, Any]) -> bool:
    if node.op in ("placeholder", "output"):
        return False
    if node.op == "get_attr" or (node.op == "call_function" and node.target in _MAKERS):
        return all(source in known for source in node.all_input_nodes)
    sources = node.all_input_nodes
    return bool(sources) and all(source in known for source in sources)


def has_parameters(traced: fx.GraphModule, node: fx.Node, value: Any) -> bool:
    """Whether a node reads parameters itself; ``value`` is its value."""
    if node.op == "call_module":
        return any(True for _ in traced.get_submodule(str(node.target)).parameters())
    return node.op == "get_attr" and isinstance(value, nn.Parameter)


def register(traced: fx.GraphModule, name: str, value: Tensor, *, learned: bool) -> None:
    """Give the model a parameter of its own, or a buffer, of that value."""
    own = value.detach().clone()
    if learned and own.is_floating_point():
        traced.register_parameter(name, nn.Parameter(own))
    else:
        traced.register_buffer(name, own)


def free_name(traced: nn.Module, path: str) -> str:
    """The path, or the next one with a number, that names nothing yet."""
    parent, _, name = path.rpartition(".")
    try:
        owner = traced.get_submodule(parent)
    except AttributeError:
        return path
    number, found = 2, name
    while hasattr(owner, found):
        found, number = f"{name}_{number}", number + 1
    return f"{parent}.{found}" if parent else found


def lift_layers(traced: fx.GraphModule) -> None:
    """Make modules of convolutions, linear layers and BatchNorms that are called as functions.

    They are named after the module whose code calls the function: ``bn1.batch_norm``.

    Args:
        traced: with the shapes of its tensors; changed in place. The modules share its parameters.
    """
    for node in list(traced.graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in _LAYERS:
            continue
        names, build = _LAYERS[node.target]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        source = given.pop("input", None)
        dims = noted_shape(source)
        if dims is None:
            continue
        read = {
            name: attribute(traced, str(value.target)) if _is_attribute(value) else value
            for name, value in given.items()
        }
        if any(isinstance(value, fx.Node) for value in read.values()):
            continue  # computed from the image: no layer
        module = build(read, len(dims))
        if module is None:
            continue
        function = getattr(node.target, "__name__", node.target)  # a method is its name
        path = free_name(traced, f"{prefix_of(node)}{function}")
        traced.add_submodule(path, module.eval())
        with traced.graph.inserting_before(node):
            call = traced.graph.call_module(path, (source,))
        call.meta, call.stack_trace = dict(node.meta), node.stack_trace
        node.replace_all_uses_with(call)
        traced.graph.erase_node(node)


def check_layers(traced: nn.Module) -> None:
    """Refuse a model in which there is nothing to compute in integers.

    Args:
        traced: with the layers that :func:`lift_layers` made.

    Raises:
        ModelError: if it has neither a convolution nor a linear layer.
    """
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    if not any(isinstance(layer, kinds) for layer in traced.modules()):
        raise ModelError(
            "wanted a model with a convolution or a linear layer, got one without any: there is "
            "nothing to quantise in it"
        )


def _is_attribute(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def prefix_of(node: fx.Node) -> str:
    """The path of the module whose code makes the call, with a dot behind it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0] if stack else ""
    return f"{path}." if path else ""


def _parameter(value: Tensor) -> nn.Parameter:
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _conv(given: dict[str, Any], rank: int) -> nn.Module | None:
    weight, bias = given.pop("weight"), given.pop("bias", None)
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d}.get(rank)
    if not isinstance(weight, Tensor) or kind is None or weight.dim() != rank:
        return None
    groups = given.get("groups", 1)
    outputs, inputs, *kernel = weight.shape
    settings = {**given, "bias": bias is not None, "device": "meta"}
    layer = kind(inputs * groups, outputs, tuple(kernel), **settings)
    return _with(layer, weight, bias)


def _linear(given: dict[str, Any], rank: int) -> nn.Module | None:
    weight, bias = given["weight"], given.get("bias")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    sizes = (weight.shape[1], weight.shape[0])
    return _with(nn.Linear(*sizes, bias=bias is not None, device="meta"), weight, bias)


def _product(given: dict[str, Any], rank: int) -> nn.Module | None:
    """``x @ weight`` of a weight that is the same for each image."""
    weight, bias = given.pop("weight"), given.pop("bias", None)
    plain = isinstance(weight, Tensor) and 2 <= weight.dim() <= rank and not given
    if not plain or math.prod(weight.shape[:-2]) != 1:
        return None
    rows = weight.detach().reshape(weight.shape[-2:]).T.contiguous()
    turned = nn.Parameter(rows, requires_grad=weight.requires_grad)
    return _linear({"weight": turned, "bias": bias}, rank)


def _batch_norm(given: dict[str, Any], rank: int) -> nn.Module | None:
    mean, variance = given.get("running_mean"), given.get("running_var")
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}.get(rank)
    if kind is None or mean is None or variance is None or given.get("training", False):
        return None
    weight, bias = given.get("weight"), given.get("bias")
    settings = {"eps": given.get("eps", 1e-5), "momentum": given.get("momentum", 0.1)}
    norm = kind(len(mean), affine=(weight is not None) or (bias is not None), **settings)
    norm.to(mean.device)
    if norm.affine:
        one = torch.ones_like(mean)
        _with(norm, one if weight is None else weight, 0 * one if bias is None else bias)
    norm.running_mean, norm.running_var = mean, variance
    return norm


def _with(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = _parameter(weight)
    if bias is not None:
        module.bias = _parameter(bias)
    built: nn.Module = module
    return built


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_PRODUCT = ("input", "weight")

_LAYERS: Mapping[Any, tuple[tuple[str, ...], Callable[[dict[str, Any], int], nn.Module | None]]] = {
    F.conv1d: (_CONV, _conv),
    F.conv2d: (_CONV, _conv),
    F.linear: (("input", "weight", "bias"), _linear),
    operator.matmul: (_PRODUCT, _product),
    torch.addmm: (("bias", *_PRODUCT), _product),
    torch.matmul: (_PRODUCT, _product),
    torch.mm: (_PRODUCT, _product),
    "matmul": (_PRODUCT, _product),
    "mm": (_PRODUCT, _product),
    F.batch_norm: (_NORM, _batch_norm),
}

"""Tables that a model's code makes for each image of the batch, as parameters.

``pos.repeat(x.shape[0], 1, 1)``, or positions that begin with ``torch.zeros(x.shape[0], h, w)``,
are the same for every image: they depend on how many there are and on nothing in them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sqakd_deploy.tracing.lifting import free_name, has_parameters, register
from sqakd_deploy.tracing.shapes import SIZE, Recorder, noted_shape, noted_type

# They read a tensor for its size, type or device alone.
_FUNCTIONS = (torch.zeros_like, torch.ones_like, torch.full_like)
_METHODS = ("new_zeros", "new_ones", "new_full", "size", "dim", "numel")
_PROPERTIES = ("device", "dtype", "ndim", "shape")

# They repeat a value (1, …) for each image themselves.
_ARITHMETIC: tuple[Any, ...] = (
    *(operator.add, operator.mul, operator.sub, operator.truediv),
    *(torch.add, torch.mul, torch.sub, torch.div),
    *("add", "mul", "sub", "div"),
)
_BROADCASTING = (*_ARITHMETIC, torch.where)
_NUMBERS = (*_ARITHMETIC, torch.cat, torch.concat)  # they read whole numbers as reals

_SAME = 1e-6  # of the largest entry: a convolution sums otherwise for another number of images


def lift_tables(traced: fx.GraphModule, images: Tensor) -> bool:
    """Replace what depends on the number of images alone by a parameter ``(1, …)``, or a buffer.

    It is expanded to the batch where a reader does not do so itself. What differs from image to
    image, as ``torch.arange(x.shape[0])`` does, is left.

    Args:
        traced: with the shapes of its tensors; changed in place.
        images: an example ``(N, C, H, W)``.

    Returns:
        Whether anything was replaced, so that new nodes lack their shapes.
    """
    counting = _counting(traced)
    tables = [node for node in counting if _is_table(node, counting)]
    if not tables or images.is_meta:
        return False
    others = torch.cat([images, images[:1]])  # one more: by itself it may lose its axis
    try:
        found, more = (_values(traced, tables, some) for some in (images, others))
    except RuntimeError:
        return False  # not for any number of images: that is refused by the node's name
    learned = _learned(traced, counting)
    lifted = [node for node in tables if _is_repeated(found[node], more[node])]
    for node in lifted:
        repeated = found[node].shape != more[node].shape
        value = found[node][:1] if repeated else found[node]
        _replace(traced, node, value, repeated=repeated, learned=node in learned)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return bool(lifted)


def _counting(traced: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes that depend on parameters and the number of images alone, in the graph's order."""
    found: dict[fx.Node, None] = {}
    for node in traced.graph.nodes:
        sources = node.all_input_nodes
        computed = bool(sources) and all(source in found for source in sources)
        if node.op == "get_attr" or _asks(node) or computed:
            found[node] = None
    found.pop(traced.graph.output_node(), None)
    return found


def _asks(node: fx.Node) -> bool:
    """Whether it reads no number of a tensor, its size at most."""
    if node.target is getattr:
        return node.args[1] in _PROPERTIES
    return node.target in _FUNCTIONS or (node.op == "call_method" and node.target in _METHODS)


def _is_table(node: fx.Node, counting: dict[fx.Node, None]) -> bool:
    """A tensor read by what depends on images; a parameter (1, …) expanded has a form already."""
    dims = noted_shape(node)
    if node.op == "get_attr" or dims is None or SIZE in node.meta:
        return False
    source = node.args[0] if node.args else None
    given = noted_shape(source)
    parameter = isinstance(source, fx.Node) and source.op == "get_attr"
    kind = noted_type(node)
    real = kind is not None and kind.is_floating_point
    plain = node.target == "expand" and parameter and real and given == (1, *dims[1:])
    return not plain and any(user not in counting for user in node.users)


@torch.no_grad()
def _values(traced: fx.GraphModule, wanted: list[fx.Node], images: Tensor) -> dict[fx.Node, Tensor]:
    recorder = Recorder(traced, {node.name for node in wanted})
    recorder.run(images)
    return {node: recorder.values[node.name].detach() for node in wanted}


def _learned(traced: fx.GraphModule, counting: dict[fx.Node, None]) -> set[fx.Node]:
    """Those of the nodes that parameters are a part of."""
    found: set[fx.Node] = set()
    parameters = dict(traced.named_parameters(remove_duplicate=False))
    for node in counting:
        value = parameters.get(str(node.target))
        if has_parameters(traced, node, value) or found & {*node.all_input_nodes}:
            found.add(node)
    return found


def _is_repeated(found: Tensor, more: Tensor) -> bool:
    """Whether each image has the same, or all have one."""
    if found.shape != more.shape:
        count = len(found) if found.dim() else 0
        if not count or more.shape != (count + 1, *found.shape[1:]):
            return False
        more = torch.cat([found, more])
        found = found[:1].expand_as(more)
    if not found.is_floating_point():
        return torch.equal(found, more)
    bound = _SAME * float(found.abs().max()) if found.numel() else 0.0
    return torch.allclose(found, more, rtol=0.0, atol=bound)


def _replace(
    traced: fx.GraphModule, node: fx.Node, value: Tensor, *, repeated: bool, learned: bool
) -> None:
    kind = next((noted_type(user) for user in node.users if user.target in _NUMBERS), None)
    if not value.is_floating_point() and kind is not None:
        value = value.to(kind)  # or else a quantizer behind it gives whole numbers, too
    name = free_name(traced, f"{node.name}_constant")
    register(traced, name, value, learned=learned)
    with traced.graph.inserting_before(node):
        read = traced.graph.get_attr(name)
    read.stack_trace = node.stack_trace
    whole = None
    for user in list(node.users):
        if not repeated or _broadcasts(user, node):
            user.replace_input_with(node, read)
            continue
        if whole is None:
            whole = _expanded(traced, node, read, value.dim())
        user.replace_input_with(node, whole)


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Whether a reader gives the same for ``(1, …)``, beside a tensor of the whole shape."""
    if user.target is F.scaled_dot_product_attention:
        return node not in user.args[:3] and node not in (user.kwargs.get("query"),)
    if user.target not in _BROADCASTING:
        return False
    partners = [noted_shape(other) for other in user.all_input_nodes if other is not node]
    return noted_shape(node) in partners or noted_shape(user) in partners


def _expanded(traced: fx.GraphModule, node: fx.Node, read: fx.Node, rank: int) -> fx.Node:
    image = next(iter(traced.graph.find_nodes(op="placeholder")))
    with traced.graph.inserting_before(node):
        count = traced.graph.call_method("size", (image, 0))
        whole = traced.graph.call_method("expand", (read, count, *[-1] * (rank - 1)))
    whole.stack_trace = node.stack_trace
    return whole

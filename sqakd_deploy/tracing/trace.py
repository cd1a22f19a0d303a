"""A model as a graph of operators with shapes (torch.fx), without in-place surprises."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from sqakd_deploy.errors import ModelError
from sqakd_deploy.nonfinite import check_finite
from sqakd_deploy.tracing import sized_tracer
from sqakd_deploy.tracing.calls import with_input_first
from sqakd_deploy.tracing.inplace import write_out_of_place
from sqakd_deploy.tracing.lifting import free_name, lift_constants, lift_layers
from sqakd_deploy.tracing.padding import part_padding
from sqakd_deploy.tracing.rewriting import rewrite
from sqakd_deploy.tracing.shapes import SIZE, noted_shape
from sqakd_deploy.tracing.tables import lift_tables
from sqakd_deploy.tracing.untraceable import advice, first_line, is_library, reason

BATCH = 2
"""Batch size of the example that shapes are read from; reports call that axis dynamic."""

_COUNTS = "counts"  # in a node's meta: it is a size that counts images
_PATH = "path"  # in a node's meta: of the module called, where its student's is another
_SAME = 1e-4  # of the largest logit: operators are the same, so that a float32's noise is enough


def trace(model: nn.Module, input_shape: tuple[int, ...]) -> fx.GraphModule:
    """Trace a model in evaluation mode and note the shape of each tensor.

    Args:
        model: left as it is; its modules are shared with the result.
        input_shape: of one image, ``(C, H, W)``.

    Returns:
        A graph module, in evaluation mode, without in-place operators; ``node.meta`` has shapes.

    Raises:
        ModelError: if the model branches on values, with the line of its code; if it does not run
            on such an image or returns no tensor; if its weights are not finite; if its graph
            answers otherwise than the model.
    """
    model.eval()
    images = _example(model, input_shape)
    tracer = sized_tracer.SizedTracer(images)
    with suppress(ModelError):  # said below
        _answer(model, images)  # tables that a model keeps from its first call are not traced then
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the model's own code raises under tracing
        _answer(model, images)  # says so if it does not run at all
        raise ModelError(
            f"cannot trace {type(model).__name__}: {reason(error)}. {advice(error)}"
        ) from error
    with_input_first(graph)
    traced = fx.GraphModule(tracer.root, graph, type(model).__name__)
    _check_inputs(traced)
    wanted = _answer(model, images)
    write_out_of_place(traced)
    lift_constants(traced)
    traced.graph.eliminate_dead_code()
    _check_modes(traced)
    traced.recompile()
    _propagate(traced, images, wanted)
    if lift_tables(traced, images):
        _propagate(traced, images, wanted)
    lift_layers(traced)
    part_padding(traced)
    rewrite(traced)
    lift_constants(traced)
    traced.graph.eliminate_dead_code()
    # Anew, without the parameters that nothing reads any more.
    traced = fx.GraphModule(traced, traced.graph, type(model).__name__)
    _propagate(traced, images, wanted)
    _check_batches(traced, images)
    return traced


def check_answers(traced: fx.GraphModule) -> None:
    """Refuse a model that does not answer each image for itself, by one row of logits.

    Raises:
        ModelError: if the first axis of its answer counts something else, as windows.
    """
    (result,) = traced.graph.output_node().all_input_nodes
    dims = noted_shape(result)
    if dims is not None and dims[:1] != (BATCH,):
        raise ModelError(
            f"wanted one row of logits for each image, ({BATCH}, K) for {BATCH}, got {dims}"
        )


def separate_calls(traced: fx.GraphModule) -> None:
    """Give each further call of a module a module of its own, ``<path>_2`` or the next free name.

    One layer's two calls have inputs of different scales, thus two accumulators, and a bias can lie
    on the grid of one of them alone; BatchNorm's inputs differ, too. The weight of a convolution or
    linear stays shared (a transposed one is laid out anew, and copied).

    Args:
        traced: changed in place.
    """
    called: set[str] = set()
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        path = str(node.target)
        module = traced.get_submodule(path)
        if path in called and list(module.parameters()):
            own = copy.deepcopy(module)
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                own.weight = module.weight
            node.meta[_PATH] = path
            node.target = free_name(traced, path)
            traced.add_submodule(node.target, own)
        called.add(path)
    _separate_parameters(traced)
    traced.recompile()


def _separate_parameters(traced: fx.GraphModule) -> None:
    """Layers written as functions of one parameter, or tied by hand, share weights alone, too."""
    held: set[int] = set()
    for path in dict.fromkeys(str(n.target) for n in traced.graph.nodes if n.op == "call_module"):
        module = traced.get_submodule(path)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            shared = name == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))
            if id(tensor) in held and not shared:
                own_copy = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    own_copy = nn.Parameter(own_copy, tensor.requires_grad)
                setattr(module, name, own_copy)
            held.add(id(tensor))


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    weight = next(iter(model.parameters()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, *input_shape, generator=generator).to(weight.device, weight.dtype)


@torch.no_grad()
def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of the model as it was written, in-place operators included."""
    try:
        logits = model(images.clone())
    except Exception as error:
        raise ModelError(
            f"the model does not run on images of shape {tuple(images.shape[1:])} (C, H, W): "
            + reason(error)
        ) from error
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"wanted a model that returns one tensor of logits, got a {type(logits).__name__}; "
            "wrap it in a module that returns its logits alone"
        )
    if not (logits.is_meta or bool(logits.isfinite().all())):
        check_finite(model)
    return logits


def _check_inputs(traced: fx.GraphModule) -> None:
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    if len([node for node in placeholders if not node.args]) != 1:
        names = ", ".join(node.name for node in placeholders)
        raise ModelError(f"wanted a model of one image tensor, got the inputs: {names}")


def _check_modes(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        if node.kwargs.get("training") is True:
            raise ModelError(
                f"{describe(node)} computes as in training even when the model is evaluated; "
                "write training=self.training"
            )


class _Shapes(ShapeProp):
    """Notes sizes (integers, tuples of them) beside the shapes of tensors."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        parts = result if isinstance(result, tuple) else (result,)
        if all(isinstance(part, int) for part in parts):
            n.meta[SIZE] = result
        return result


@torch.no_grad()
def _propagate(traced: fx.GraphModule, images: Tensor, wanted: Tensor) -> None:
    """Note shapes, and compare the answer with that of the model as it was written."""
    found = _Shapes(traced).propagate(images)
    if _differs(found, wanted):
        raise ModelError(
            "the model's graph does not answer as the model does. It may change a tensor in place "
            "through another name of it (a view, a slice), or draw random numbers when evaluated; "
            "write such operators out of place, without randomness"
        )


class _Counting(fx.Interpreter):
    """Runs on more images than shapes were noted of: each first axis must count as many more."""

    def __init__(self, traced: fx.GraphModule, count: int) -> None:
        super().__init__(traced)
        self.count = count
        self.extra_traceback = False  # which would replace the message

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except RuntimeError as error:
            raise ModelError(
                f"{describe(n)} runs on {BATCH} images and not on {self.count}: "
                f"{first_line(error)}; compute its sizes from x.shape[0]"
            ) from error
        if SIZE in n.meta and result != n.meta[SIZE]:
            n.meta[_COUNTS] = True
        noted = None if n.op == "get_attr" else noted_shape(n)
        counts = bool(noted) and not noted[0] % BATCH  # type: ignore[index]
        if counts and result.shape[0] * BATCH != noted[0] * self.count:  # type: ignore[index]
            raise ModelError(f"{describe(n)}: wanted a tensor with the batch as its first axis")
        return result


@torch.no_grad()
def _check_batches(traced: fx.GraphModule, images: Tensor) -> None:
    more = torch.cat([images, images[:1]])
    _Counting(traced, len(more)).run(more)


def _differs(found: Tensor, wanted: Tensor) -> bool:
    finite = wanted[wanted.isfinite()]  # a network of roots and logarithms need not be so
    bound = _SAME * float(finite.abs().max()) if finite.numel() else 0.0
    return not torch.allclose(found, wanted, rtol=0, atol=bound, equal_nan=True)


def known(argument: Any) -> Any:
    """An argument of a call with every computed size in it replaced by its value.

    Raises:
        ModelError: if that depends on the number of images.
    """
    return fx.node.map_arg(argument, _known)


def _known(node: fx.Node) -> Any:
    if node.meta.get(_COUNTS):
        raise ModelError(
            f"{describe(node)}: computes with the number of images, so that an answer depends on "
            "the images beside it"
        )
    return node.meta.get(SIZE, node)


def shape(node: fx.Node) -> tuple[int | None, ...]:
    """Shape of a node's tensor, None for its first axis: images, or as many parts of each.

    The windows of an image may lie behind each other on that axis, as do the images: no operator
    that is known moves it.

    Raises:
        ModelError: if the node is no tensor or its first axis does not count images.
    """
    meta = node.meta.get("tensor_meta")
    if not isinstance(meta, TensorMetadata) or not meta.shape or meta.shape[0] % BATCH:
        raise ModelError(f"{describe(node)}: wanted a tensor with the batch as its first axis")
    return (None, *meta.shape[1:])


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor (not a size or a tuple)."""
    return noted_shape(node) is not None


def describe(node: fx.Node) -> str:
    """What a person needs to find a node in their model: name, operator and line."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    if node.op == "call_module":
        owner = node.graph.owning_module
        kind = type(owner.get_submodule(str(node.target))).__name__ if owner else "module"
        what = f"layer '{target}' ({kind})"
    else:
        what = f"operator '{target}' (node '{node.name}')"
    line = _user_line(node.stack_trace)
    return f"{what} at {line}" if line else what


def layer_name(node: fx.Node) -> str:
    """The name that exclude patterns match: the module's path, or the node's name.

    A module that is called again has another path in a student, and the same here.
    """
    return str(node.meta.get(_PATH, node.target)) if node.op == "call_module" else node.name


def _user_line(stack: str | None) -> str | None:
    """``file.py:12`` of the innermost frame outside torch."""
    lines = [line.strip() for line in (stack or "").splitlines() if line.strip().startswith("File")]
    outside = [line for line in lines if not is_library(line)]
    if not outside:
        return None
    file, number = outside[-1].split('"')[1], outside[-1].split("line ")[1].split(",")[0]
    return f"{Path(file).name}:{number}"


def is_parameter(value: object) -> bool:
    """Whether it is a node that reads a bare parameter or buffer."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def reads(node: fx.Node) -> list[fx.Node]:
    """The nodes it reads, with repetitions, as in ``x + x``."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes it reads whose values are computed tensors."""
    return [n for n in node.all_input_nodes if is_tensor(n) and not is_parameter(n)]


def tensor_inputs_through(node: fx.Node) -> list[fx.Node]:
    """Inputs that are tensors or tuples of tensors (a split's pieces read the split)."""
    return tensor_inputs(node) or list(node.all_input_nodes)


def first_tensor(batch: object) -> Tensor:
    """The images of a loader's batch: the tensor, or the first element of a tuple."""
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(images, Tensor):
        raise ModelError(f"wanted a tensor of images, got {type(images).__name__}")
    return images

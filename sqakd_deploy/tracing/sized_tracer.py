"""Tracing with the sizes of an image known, so that code may compute and branch with them.

Only the batch stays open. Code that pads to a multiple (``math.ceil(x.shape[-1] / stride)``),
checks its input (``assert h % 4 == 0``) or loops over channels is common, and needs no image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sqakd_deploy.tracing.inplace import set_item_
from sqakd_deploy.tracing.shapes import run

# A prime that no image's or layer's size is a multiple of: an axis that is counts images.
_BATCH = 10_007


# Of torchvision, known by its name: random in training, and nothing otherwise.
_WHOLE = ("stochastic_depth",)

_REPEATING = ("expand", "repeat")


def _is_foreign(target: object) -> bool:
    """Whether it is a function written in Python, and not one of torch's."""
    if not isinstance(target, FunctionType) or target.__name__ in _WHOLE or target is set_item_:
        return False
    return target.__module__.partition(".")[0] not in ("torch", "math", "_operator")


@contextmanager
def _sizes_in_a_row() -> Iterator[None]:
    """Let ``torch.zeros(x.shape[0], 4)`` be traced: torch takes proxies in a tuple alone.

    ``buffer.expand(x.shape[0], 4)`` is a method of a tensor that is no proxy, and likewise.
    """
    made = {name: getattr(torch, name) for name in ("zeros", "ones", "empty")}

    def with_tuple(make: Callable[..., Any], *size: Any, **options: Any) -> Any:
        counted = len(size) > 1 and any(isinstance(extent, fx.Proxy) for extent in size)
        return make(size, **options) if counted else make(*size, **options)

    for name, make in made.items():
        setattr(torch, name, partial(with_tuple, make))
    for name in _REPEATING:
        setattr(Tensor, name, _recorded(name))  # before the one that it inherits
    try:
        yield
    finally:
        for name, make in made.items():
            setattr(torch, name, make)
        for name in _REPEATING:
            delattr(Tensor, name)


def _recorded(name: str) -> Callable[..., Any]:
    """A method of tensors that is a call of the graph where a size of it counts images."""
    plain = getattr(Tensor, name)

    def method(tensor: Tensor, *sizes: Any, **options: Any) -> Any:
        given = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        counted = next((size for size in given if isinstance(size, fx.Proxy)), None)
        if counted is None:
            return plain(tensor, *sizes, **options)
        return counted.tracer.create_proxy("call_method", name, (tensor, *given), options)

    return method


class SizedTracer(fx.Tracer):
    """A tracer whose proxies know their sizes; the values are never computed.

    Args:
        images: an example ``(N, C, H, W)``, for its sizes and type. Without one no size is known,
            as when a pickled graph is traced again, which needs none.
    """

    record_stack_traces = True

    def __init__(self, images: Tensor | None = None) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._images: Tensor | None = None
        if images is not None:
            with self._fake:
                self._images = images.new_empty(_BATCH, *images.shape[1:])
        self._values: dict[fx.Node, Any] = {}
        self._computing = False

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        """As the base does, and what the node gives is noted where that can be known.

        Arguments of the model that have a default have that value. A function of the model's own
        library that asks to be left whole (``torch.fx.wrap``) is traced all the same, where it can.
        """
        if kind == "placeholder" and args:
            return args[0]
        if kind == "call_function" and self._images is not None and _is_foreign(target):
            try:
                return self._through(target, args, kwargs)
            except Exception:  # whatever its code raises under tracing: then it is one operator
                pass
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        self._note(proxy.node)
        return proxy

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As the base does; what was traced through is no longer taken for one operator."""
        with _sizes_in_a_row():
            graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if not _is_foreign(node.target):
                node.meta.pop("is_wrapped", None)
        return graph

    def _through(self, function: Callable[..., Any], args: Any, kwargs: Any) -> fx.Proxy:
        """What a function gives of proxies; the graph is as before if it fails."""
        before = next(iter(reversed(self.graph.nodes)))
        try:
            result = function(*args, **kwargs)
            if not isinstance(result, fx.Proxy):
                raise TypeError(f"a {type(result).__name__} is no operator's value")
            return result
        except Exception:
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                if node.op != "get_attr":  # another reader of the parameter is given the same node
                    self.graph.erase_node(node)
            raise

    def create_arg(self, a: Any) -> Any:
        """As the base does, but numpy's numbers become Python's, which generated code can hold."""
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """One that knows its sizes."""
        return _SizedProxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a tuple, or of a tensor whose first axis is not the batch."""
        count = self.length(obj.node)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])  # type: ignore[index]

    def length(self, node: fx.Node) -> int | None:
        """Of its value, where it is known and has one."""
        value = self._values.get(node)
        if isinstance(value, Tensor):
            sizes = self.sizes(node)
            return sizes[0] if sizes else None
        return len(value) if isinstance(value, (tuple, list)) else None

    def value(self, node: fx.Node) -> Tensor | None:
        """Its tensor, without numbers: type and device are true."""
        found = self._values.get(node)
        return found if isinstance(found, Tensor) else None

    def sizes(self, node: fx.Node) -> tuple[int | None, ...] | None:
        """Of its tensor, None for an axis that counts images; None if it is no known tensor."""
        value = self.value(node)
        if value is None:
            return None
        return tuple(None if size % _BATCH == 0 and size else int(size) for size in value.shape)

    def _note(self, node: fx.Node) -> None:
        if self._images is None:
            return
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in self._values:
                self._note(source)  # the base makes buffers' nodes itself
            if source not in self._values:
                return
        if self._is_evaluated_norm(node):
            self._values[node] = self._values[node.args[0]]  # type: ignore[index]
            return
        self._computing = True
        try:
            with self._fake, torch.no_grad():
                self._values[node] = (
                    self._images if node.op == "placeholder" else run(self.root, node, self._values)
                )
        except Exception:  # whatever an operator raises that cannot do without values
            return
        finally:
            self._computing = False

    def _is_evaluated_norm(self, node: fx.Node) -> bool:
        """Whether it gives a tensor like the one it is given: torch takes ten times as long to tell
        that of a BatchNorm as of a convolution."""
        if not (node.args and isinstance(node.args[0], fx.Node)):
            return False
        if node.target is F.batch_norm:
            training = node.args[5] if len(node.args) > 5 else node.kwargs.get("training", False)
            return training is False
        if node.op != "call_module":
            return False
        module = self.root.get_submodule(str(node.target))
        return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not module.training

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As the base does, but modules run as they are while a value is computed.

        One that the model's code makes as it runs (``self.layers[1:](x)``) is traced through.
        """
        if self._computing or self._is_made_here(m):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def _is_made_here(self, module: nn.Module) -> bool:
        held = module in self.submodule_paths  # type: ignore[operator]
        return not held and not list(module.parameters(recurse=False))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As the base does, but parameters are no proxies while a value is computed."""
        if self._computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Device(fx.proxy.Attribute):
    """A device of the graph whose type is known.

    The device itself is not given: models keep by it what they computed, which here are proxies.
    """

    def __init__(self, root: fx.Proxy, kind: str) -> None:
        super().__init__(root, "device")
        self.type = kind


class _SizedProxy(fx.Proxy):
    """A proxy that answers with numbers where they do not depend on the batch."""

    tracer: SizedTracer

    @property
    def shape(self) -> Any:
        return self.size()

    @property
    def ndim(self) -> Any:
        return self.dim()

    def dim(self) -> Any:
        sizes = self.tracer.sizes(self.node)
        return self._plain("dim") if sizes is None else len(sizes)

    def size(self, dim: int | None = None) -> Any:
        sizes = self.tracer.sizes(self.node)
        if sizes is None:
            return self._plain("size", *(() if dim is None else (dim,)))
        found = tuple(
            self._plain("size", axis) if size is None else size for axis, size in enumerate(sizes)
        )
        return found if dim is None else found[dim]

    @property
    def dtype(self) -> Any:
        value = self.tracer.value(self.node)
        return self.__getattr__("dtype") if value is None else value.dtype

    @property
    def device(self) -> Any:
        value = self.tracer.value(self.node)
        return self.__getattr__("device") if value is None else _Device(self, value.device.type)

    def numel(self) -> Any:
        sizes = self.tracer.sizes(self.node)
        known = sizes is not None and None not in sizes
        return math.prod(self.size()) if known else self._plain("numel")

    def new_zeros(self, *size: Any, **options: Any) -> Any:
        return self._filled("new_zeros", torch.zeros, size, options)

    def new_ones(self, *size: Any, **options: Any) -> Any:
        return self._filled("new_ones", torch.ones, size, options)

    def _filled(self, method: str, make: Any, size: Any, options: dict[str, Any]) -> Any:
        """A tensor, so that code may write into it, where its size is known."""
        value = self.tracer.value(self.node)
        sizes = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        if value is None or options or not all(type(extent) is int for extent in sizes):
            return self.tracer.create_proxy("call_method", method, (self, *size), options)
        return make(*sizes, dtype=value.dtype, device=value.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", set_item_, (self, index, value), {})

    def __len__(self) -> int:
        length = self.tracer.length(self.node)
        if length is None and self.tracer.sizes(self.node):
            raise RuntimeError("len() of a batch counts its images; write x.shape[0]")
        return super().__len__() if length is None else length

    def _plain(self, method: str, *args: int) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", method, (self, *args), {})

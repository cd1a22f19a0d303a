"""What each operator of a traced model means, in the terms of :mod:`sqakd_deploy.graph`.

One table for placement and lowering: an :class:`Op` names the graph node that an operator becomes
and carries the attributes that do not depend on numbers.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ModelError
from sqakd_deploy.lowering import pools
from sqakd_deploy.lowering.float_ops import FUNCTIONS, METHODS, MODULES, axes_of, dropped, shifted
from sqakd_deploy.lowering.meaning import Identity, Op, Reader, Scalar, Tuple, setting, simple
from sqakd_deploy.lowering.spatial import bilinear, pad
from sqakd_deploy.tracing.resizing import is_list_of_indices
from sqakd_deploy.tracing.shapes import is_size
from sqakd_deploy.tracing.trace import describe, is_parameter, known, shape


def read(node: fx.Node) -> Op | None:
    """The meaning of a call node; None where the table has none."""
    module = None
    if is_size(node):
        return Op(Scalar)
    if node.op == "call_module":
        owner = node.graph.owning_module
        if owner is None:
            raise ModelError(f"node {node.name!r} belongs to no module")
        module = owner.get_submodule(str(node.target))
        reader = next((_MODULES[c] for c in type(module).__mro__ if c in _MODULES), None)
    elif node.op == "call_method":
        reader = _METHODS.get(str(node.target))
    else:
        reader = _FUNCTIONS.get(node.target) or dropped(node.target)
    op = reader(node, module) if reader else None
    if op is not None and not op.takes_parameters and any(map(is_parameter, node.all_input_nodes)):
        raise ModelError(
            f"{describe(node)}: reads a bare parameter, which has no integer form here"
        )
    return op


def _mean(node: fx.Node, module: nn.Module | None) -> Op:
    """The pixels' mean; any other that was left as it is (that of lengths) stays in float."""
    rank = len(shape(node.all_input_nodes[0]))
    wanted = axes_of(setting(node, module, "dim", 1, None), rank)
    if not wanted or wanted[0] == 0:
        raise ModelError(f"{describe(node)}: only a mean over axes of an image can be exported")
    if (rank, wanted) == (4, (2, 3)):
        return Op(ir.GlobalAveragePool)
    return Op(ir.Reduce, {"function": "mean", "axes": wanted})


def _concat(node: fx.Node, module: nn.Module | None) -> Op:
    if isinstance(setting(node, module, "tensors", 0, None), fx.Node):
        raise ModelError(
            f"{describe(node)}: concatenates a computed tuple; take its tensors one by one, as in "
            "a, b = x.chunk(2, 1)"
        )
    axis = setting(node, module, "dim", 1, node.kwargs.get("axis", 0))
    return Op(ir.Concat, {"axis": axis % len(shape(node))})


def _add(node: fx.Node, module: nn.Module | None) -> Op:
    if (moved := shifted(node)) is not None:
        return moved
    terms = (node.args[0], setting(node, module, "other", 1, None))
    sources = [value for value in terms if isinstance(value, fx.Node)]
    if len(sources) == 1 and any(type(term) in (int, float) and term == 0 for term in terms):
        return Op(Identity)  # Python's sum() begins with 0
    if len(sources) != 2 or node.kwargs.get("alpha", 1) != 1:
        raise ModelError(f"{describe(node)}: only the sum of two tensors can be exported")
    first, second = shape(sources[0]), shape(sources[1])
    if shape(node) not in (first, second) or len(first) != len(second):
        raise ModelError(
            f"{describe(node)}: the sum of shapes {first} and {second}; one must have the "
            "result's shape and the other as many axes"
        )
    return Op(ir.Add)


def _get_item(node: fx.Node, module: nn.Module | None) -> Op:
    source, index = node.args[0], known(node.args[1])
    if not isinstance(source, fx.Node):
        raise ModelError(f"{describe(node)}: indexing something that is no tensor")
    meaning = read(source) if source.op.startswith("call") else None
    if meaning is not None and issubclass(meaning.kind, Tuple):
        if not isinstance(index, int):
            raise ModelError(f"{describe(node)}: take the tensors of a tuple one by one")
        return _piece(source, meaning, index)
    return _slice(node, index if isinstance(index, tuple) else (index,))


def _piece(source: fx.Node, cut: Op, index: Any) -> Op:
    """The ``index``-th tensor of a split or chunk, as a slice of what was cut."""
    axis = cut.attributes["axis"]
    sizes = [part.shape[axis] for part in source.meta["tensor_meta"]]
    index %= len(sizes)
    start = sum(sizes[:index])
    ends = (start + sizes[index],)
    return Op(ir.Slice, {"axes": (axis,), "starts": (start,), "ends": ends, "steps": (1,)})


def _slice(node: fx.Node, index: tuple[Any, ...]) -> Op:
    dims = shape(node.all_input_nodes[0])
    if Ellipsis in index:
        at = index.index(Ellipsis)
        rest = (slice(None),) * (len(dims) + 1 - len(index))
        index = (*index[:at], *rest, *index[at + 1 :])
    chosen = [axis for axis, part in enumerate(index) if is_list_of_indices(part)]
    if len(chosen) == 1 and all(part == slice(None) for part in index if type(part) is slice):
        return _select(node, index, chosen[0])
    if not all(isinstance(part, (slice, int)) for part in index):
        raise ModelError(
            f"{describe(node)}: only slices (start:stop:step), numbers, and a list of numbers "
            "along one axis can be exported"
        )
    index = tuple(_as_slice(part) for part in index)
    if (index[0].start or 0, index[0].stop, index[0].step or 1) == (0, None, 1):
        index = (slice(None), *index[1:])  # the whole batch, whatever its size
    cuts = [(axis, part) for axis, part in enumerate(index) if part != slice(None)]
    if any(axis == 0 for axis, _ in cuts):
        raise ModelError(f"{describe(node)}: a slice of the batch")
    ranges = [part.indices(int(dims[axis] or 0)) for axis, part in cuts]
    return Op(
        ir.Slice,
        {
            "axes": tuple(axis for axis, _ in cuts),
            "starts": tuple(start for start, _, _ in ranges),
            "ends": tuple(stop for _, stop, _ in ranges),
            "steps": tuple(step for _, _, step in ranges),
        },
    )


def _select(node: fx.Node, index: tuple[Any, ...], axis: int) -> Op:
    extent = shape(node.all_input_nodes[0])[axis]
    if extent is None or len([part for part in index if type(part) is not slice]) > 1:
        raise ModelError(f"{describe(node)}: wanted a list of numbers along one axis of an image")
    return Op(ir.Select, {"axis": axis, "indices": tuple(at % extent for at in index[axis])})


def _as_slice(part: slice | int) -> slice:
    """The axis that a number takes stays, of size 1, until the value is reshaped."""
    return part if isinstance(part, slice) else slice(part, part + 1 or None)


def _cut(node: fx.Node, module: nn.Module | None) -> Op:
    axis = setting(node, module, "dim", 2, 0)
    return Op(Tuple, {"axis": axis % len(shape(node.all_input_nodes[0]))})


def _permute(node: fx.Node, module: nn.Module | None) -> Op:
    order = setting(node, module, "dims", 1, None)
    perm: Any = order if isinstance(order, (tuple, list)) else node.args[1:]
    rank = len(shape(node))
    return _transposition(node, tuple(int(axis) % rank for axis in perm))


def _transpose(node: fx.Node, module: nn.Module | None) -> Op:
    rank = len(shape(node))
    first = setting(node, module, "dim0", 1, 0) % rank
    second = setting(node, module, "dim1", 2, 0) % rank
    perm = list(range(rank))
    perm[first], perm[second] = second, first
    return _transposition(node, tuple(perm))


def _transposition(node: fx.Node, perm: tuple[int, ...]) -> Op:
    if perm[0] != 0:
        raise ModelError(f"{describe(node)}: moves the batch axis")
    return Op(ir.Transpose, {"perm": perm})


def _transposed_conv(node: fx.Node, module: nn.Module | None) -> Op:
    if len(node.args) + len(node.kwargs) != 1:
        raise ModelError(f"{describe(node)}: output_size has no form here; set output_padding")
    return Op(ir.Conv)


def _vector_norm(node: fx.Node, module: nn.Module | None) -> Op:
    if len(shape(node)) != 2:
        raise ModelError(f"{describe(node)}: only BatchNorm1d of vectors (N, C) can be exported")
    return _batch_norm(node, module)


def _batch_norm(node: fx.Node, module: nn.Module | None) -> Op:
    if getattr(module, "running_var", None) is None:
        raise ModelError(
            f"{describe(node)}: keeps no running statistics, so that an answer depends on the "
            "images beside it; train the model with track_running_stats=True"
        )
    return Op(ir.ChannelAffine)


def _recurrent(node: fx.Node, module: nn.Module | None) -> Op:
    raise ModelError(
        f"{describe(node)}: a recurrent layer has no form here, in float neither; use convolutions "
        "or attention in its place"
    )


def _hardtanh(node: fx.Node, module: nn.Module | None) -> Op:
    low = float(setting(node, module, "min_val", 1, -1.0))
    return Op(ir.Clip, {"low": low, "high": float(setting(node, module, "max_val", 2, 1.0))})


def _clamp(node: fx.Node, module: nn.Module | None) -> Op:
    return _bounded(
        node, setting(node, module, "min", 1, None), setting(node, module, "max", 2, None)
    )


def _clamp_max(node: fx.Node, module: nn.Module | None) -> Op:
    return _bounded(node, None, setting(node, module, "max", 1, None))


def _bounded(node: fx.Node, low: Any, high: Any) -> Op:
    if not all(isinstance(bound, (int, float, type(None))) for bound in (low, high)):
        raise ModelError(f"{describe(node)}: wanted numbers as bounds, not tensors")
    low, high = -math.inf if low is None else float(low), None if high is None else float(high)
    return Op(ir.Clip, {"low": low, "high": high})


def _property(node: fx.Node, module: nn.Module | None) -> Op | None:
    return Op(Scalar) if node.args[1] in ("device", "dtype") else None


_RELU = simple(ir.Clip, low=0.0, high=None)
_RELU6 = simple(ir.Clip, low=0.0, high=6.0)
_IDENTITY = simple(Identity)
_RESHAPE = simple(ir.Reshape)

_MODULES: dict[type[nn.Module], Reader] = {
    nn.Conv2d: simple(ir.Conv),
    nn.ConvTranspose2d: _transposed_conv,
    nn.Linear: simple(ir.Linear),
    nn.BatchNorm1d: _vector_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _RELU,
    nn.ReLU6: _RELU6,
    nn.Hardtanh: _hardtanh,
    nn.MaxPool2d: pools.max_pool,
    nn.AvgPool2d: pools.average_pool,
    nn.AdaptiveAvgPool2d: pools.adaptive_pool,
    nn.AdaptiveMaxPool2d: pools.adaptive_max_pool,
    nn.Flatten: _RESHAPE,
    nn.ConstantPad2d: pad,
    nn.ReflectionPad2d: pad,
    nn.ReplicationPad2d: pad,
    nn.Upsample: bilinear,
    nn.RNNBase: _recurrent,
    nn.Identity: _IDENTITY,
    nn.Dropout: _IDENTITY,
    nn.Dropout2d: _IDENTITY,
    **MODULES,
}

_FUNCTIONS: dict[Any, Reader] = {
    operator.add: _add,
    torch.add: _add,
    torch.cat: _concat,
    torch.concat: _concat,
    torch.concatenate: _concat,
    torch.clone: _IDENTITY,
    F.relu: _RELU,
    torch.relu: _RELU,
    F.relu6: _RELU6,
    F.hardtanh: _hardtanh,
    torch.clamp: _clamp,
    torch.clamp_max: _clamp_max,
    torch.clamp_min: _clamp,
    torch.clip: _clamp,
    F.max_pool2d: pools.max_pool,
    F.max_pool2d_with_indices: pools.with_indices,
    torch.max_pool2d: pools.max_pool,
    F.avg_pool2d: pools.average_pool,
    F.adaptive_avg_pool2d: pools.adaptive_pool,
    F.adaptive_max_pool2d: pools.adaptive_max_pool,
    F.adaptive_max_pool2d_with_indices: pools.with_indices,
    torch.flatten: _RESHAPE,
    torch.reshape: _RESHAPE,
    torch.squeeze: _RESHAPE,
    torch.unflatten: _RESHAPE,
    torch.unsqueeze: _RESHAPE,
    torch.mean: _mean,
    torch.permute: _permute,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    torch.chunk: _cut,
    torch.split: _cut,
    F.interpolate: bilinear,
    F.pad: pad,
    F.dropout: _IDENTITY,
    F.dropout2d: _IDENTITY,
    getattr: _property,
    operator.getitem: _get_item,
    **FUNCTIONS,
}

_METHODS: dict[str, Reader] = {
    "add": _add,
    "relu": _RELU,
    "clamp": _clamp,
    "clamp_max": _clamp_max,
    "clamp_min": _clamp,
    "clip": _clamp,
    "mean": _mean,
    "flatten": _RESHAPE,
    "reshape": _RESHAPE,
    "view": _RESHAPE,
    "squeeze": _RESHAPE,
    "unflatten": _RESHAPE,
    "unsqueeze": _RESHAPE,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "chunk": _cut,
    "split": _cut,
    "clone": _IDENTITY,
    "contiguous": _IDENTITY,
    "detach": _IDENTITY,
    "float": _IDENTITY,
    **METHODS,
}

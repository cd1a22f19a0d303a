"""A student in its integers' arithmetic: in PyTorch, what integer kernels answer, bit for bit.

A student in training simulates: it sums products of real numbers in float32, in an order of the
library's choosing, and where a sum comes to lie beside the border of two codes, rounding alone
decides on which side. Deep students carry that on, so that a simulation is not even itself in
another order of its sums. Integer kernels have no such choice. Their sums are exact, and each is
rounded by few operations, all known: with the accumulator ``a`` (an integer), the input's scale
``s_x``, a channel's ``s_w`` and the step ``s_y`` of the quantizer behind the layer, ONNX Runtime's
QLinearConv and QGemm compute in float32

    ``r = (s_x · s_w) / s_y``,  ``q = round_half_even(float32(a) · r) + zero_point``

and cut ``q`` to the type. :func:`in_integers` computes the same. What lies between layers is
computed in float64 and rounded to float32 once, before it becomes a code: codes of sums, products
and pools are the runtime's, whatever the order of its operations, where none lies beside a border
(:mod:`~sqakd_deploy.lowering.borders` sees to that); of functions that stay in float (a softmax,
LayerNorm), rounding may still decide.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.lowering.folding import affine_of, weight_and_bias
from sqakd_deploy.lowering.integer import lowered
from sqakd_deploy.lowering.lowerable import Lowered, without_form
from sqakd_deploy.quantization import BATCH_NORMS, weight_quantizers
from sqakd_deploy.quantizers import WeightQuantizer

_ORDER_KEPT = (ir.Clip, ir.Concat, *ir.DATA_MOVEMENT)
"""Nodes that give a number on as it is, or cut: steps of the quantizer behind them are no other."""

_EXACT = 2**24  # float32 holds all integers up to it


@torch.no_grad()
def in_integers(student: nn.Module) -> fx.GraphModule:
    """A copy that answers as the exported file does, where the runtime computes in integers.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize` and calibrated; not changed.

    Returns:
        A module in evaluation mode that takes float32 images ``(N, C, H, W)`` and gives float32
        logits. Its nodes have the student's names. It is on the student's device, or on the CPU
        where that knows no float64.

    Raises:
        ModelError: if the module is no student.
        ExportError: if a layer has no integer form, naming it.
        SpecError: if the student was never calibrated.
    """
    known = lowered(student)
    exact: Any = in_float64(student)
    for node in known.graph.nodes:
        if isinstance(node, (ir.Conv, ir.Linear)) and node.name in known.paths:
            _replace_layer(exact, student, known, node)
        elif isinstance(node, ir.Quantize):
            _set(exact, node.name, _Rounded(known.graph, node))
    _take_float32(exact)
    return exact.eval()


def as_deployed(student: nn.Module) -> nn.Module:
    """:func:`in_integers`, or a student that has no integers as it is."""
    return student if without_form(student) is not None else in_integers(student)


@torch.no_grad()
def in_float64(student: nn.Module) -> nn.Module:
    """A copy that computes in float64 what a student computes in float32, but for quantizers.

    Those take and round float32, as the student's do, and weights have the student's codes. What
    the two answer differently is float32's rounding between quantizers, as the student amplifies
    it.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize`; not changed.

    Returns:
        A module that takes float64 images ``(N, C, H, W)``. It is on the student's device, or on
        the CPU where that knows no float64.
    """
    exact = copy.deepcopy(student)
    if next(exact.parameters()).device.type == "mps":
        exact = exact.cpu()
    rounded = {}
    for path, quantizer in weight_quantizers(exact).items():
        layer: Any = exact.get_submodule(path.partition(".weight_quant")[0])
        codes, scale = quantizer.encode(layer.weight)
        rounded[layer] = codes.double() * scale.double()
        _set(exact, path, _AsItIs(quantizer))
    for layer, weight in rounded.items():
        _set_weight(layer, weight)
    return exact.double().eval()


class _AsItIs(nn.Module):
    """Stands for the quantizer of a weight that is rounded already."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.zero, self.bit_width = quantizer.zero, quantizer.bit_width

    def forward(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight, torch.ones_like(self.zero), self.zero, self.bit_width


class _Rounded(nn.Module):
    """Stands for an activation quantizer: real numbers to the ones that their codes stand for.

    A number was rounded to float32 once (see :class:`_IntegerLayer`) or is rounded here; dividing
    in float64 what was multiplied there gives it back, since the rest is far below float32.
    """

    def __init__(self, graph: ir.IntegerGraph, node: ir.Quantize) -> None:
        super().__init__()
        grid = graph.values[node.output].grid
        assert grid is not None  # Quantize writes no other
        self.step, self.scale = float(node.step), float(grid.scale)
        self.low, self.high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point

    def forward(self, x: Tensor) -> Tensor:
        position = (x.double() / self.step).float()
        return position.round().clamp(self.low, self.high).double() * self.scale


class _IntegerLayer(nn.Module):
    """A layer on codes: exact sums, then float32 as the kernels have it.

    Args:
        layer: that sums, without a bias; its weight is set to the codes.
        weight: the codes, as ``layer`` has them, and a scale for each output channel ``(O,)``.
        bias: in the accumulator's steps.
        grid: of what it reads.
        step: of the quantizers behind it; None where they differ or there is none.
    """

    ratio: Tensor
    bias: Tensor

    def __init__(
        self,
        layer: Any,
        weight: ir.IntWeight,
        bias: ir.IntBias | None,
        grid: ir.Grid,
        step: np.float32 | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.scale, self.step = float(grid.scale), 1.0 if step is None else float(step)
        product = np.float32(grid.scale) * weight.scale
        ratio = product if step is None else product / step
        codes = np.zeros(len(ratio), np.int32) if bias is None else bias.codes
        device: torch.device = layer.weight.device
        narrow = _largest_sum(weight, codes, grid) < _EXACT and _float32_sums_as_written(device)
        self.dtype = torch.float32 if narrow else torch.float64
        _set_weight(layer, torch.from_numpy(weight.codes).to(device, self.dtype))
        self.register_buffer("ratio", torch.from_numpy(ratio).to(device))
        self.register_buffer("bias", torch.from_numpy(codes).to(device, torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        codes = (x / self.scale).round().to(self.dtype)
        products = self.layer(codes)
        last = isinstance(self.layer, nn.Linear)
        by_channel = (-1,) if last else (-1, *[1] * (products.dim() - 2))
        accumulator = products.double().round() + self.bias.reshape(by_channel)
        scaled = accumulator.float() * self.ratio.reshape(by_channel)
        return scaled.double() * self.step


class _EachChannel(nn.Module):
    """A BatchNorm on its own: a factor for each channel of ``(N, C, …)``, here its code."""

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(-1, *[1] * (x.dim() - 2))


def _replace_layer(exact: Any, student: Any, known: Lowered, node: ir.Conv | ir.Linear) -> None:
    """Put an integer layer, and nothing for the BatchNorm folded into it, in a layer's place."""
    grid = known.graph.values[node.inputs[0]].grid
    if grid is None or not isinstance(node.weight, ir.IntWeight):
        return  # it reads floats, or is one
    path, norm = known.paths[node.name], known.norms.get(node.name)
    layer: Any = exact.get_submodule(path)
    step = step_behind(known.graph, node.output)
    bias = node.bias if isinstance(node.bias, ir.IntBias) else None
    if isinstance(layer, BATCH_NORMS):
        weight = ir.IntWeight(
            node.weight.codes.reshape(-1), node.weight.scale, node.weight.bits, False
        )
        summed: nn.Module = _EachChannel(len(weight.scale), next(exact.parameters()).device)
    else:  # a transposed convolution's node has another layout than the layer
        affine = affine_of(student.get_submodule(norm)) if norm else None
        own, own_bias = weight_and_bias(student.get_submodule(path), affine, grid)
        assert isinstance(own, ir.IntWeight)
        weight, bias = own, own_bias if isinstance(own_bias, ir.IntBias) else None
        layer.bias, summed = None, layer
        if norm is not None:
            _set(exact, norm, nn.Identity())
    _set(exact, path, _IntegerLayer(summed, weight, bias, grid, step))


def step_behind(graph: ir.IntegerGraph, name: str) -> np.float32 | None:
    """The step of the quantizers that read a value, if all readers are such and have the same."""
    found = set(_steps(graph, name))
    return found.pop() if len(found) == 1 else None


def _steps(graph: ir.IntegerGraph, name: str) -> Iterator[np.float32 | None]:
    for node in graph.nodes:
        if name in node.inputs:
            if isinstance(node, ir.Quantize):
                yield np.float32(node.step)
            elif isinstance(node, _ORDER_KEPT):
                yield from _steps(graph, node.output)
            else:
                yield None


def _largest_sum(weight: ir.IntWeight, bias: Any, grid: ir.Grid) -> int:
    """The largest that an accumulator, or a part of its sum, can be."""
    level = max(grid.qmax - grid.zero_point, grid.zero_point - grid.qmin)
    by_channel = np.abs(weight.codes.astype(np.int64)).reshape(len(weight.scale), -1).sum(axis=1)
    return int((by_channel * level + np.abs(bias.astype(np.int64))).max())


def _float32_sums_as_written(device: torch.device) -> bool:
    """Whether convolutions add products of float32 as they are. Accelerators may sum in TF32, and
    libraries transform small kernels (Winograd): exact for real numbers, not for float32."""
    wanted = torch.get_float32_matmul_precision() == "highest"
    return device.type == "cpu" and wanted and torch.backends.mkldnn.is_available()


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer a weight of its own: others may share the one it has. By way of its dictionary,
    since a Brevitas layer makes a new quantizer for each weight that it is given."""
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _take_float32(exact: fx.GraphModule) -> None:
    """Let it read and write float32, as the student does, with all between in float64."""
    graph = exact.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.users:
            with graph.inserting_after(node):
                wide = graph.call_method("double", (node,))
            node.replace_all_uses_with(wide, lambda user, wide=wide: user is not wide)
        elif node.op == "output":
            for result in node.all_input_nodes:
                with graph.inserting_before(node):
                    node.replace_input_with(result, graph.call_method("float", (result,)))
        else:
            _widen(node)
    exact.recompile()


def _widen(node: fx.Node) -> None:
    """What a model turns into float32 itself stays as wide as its constants."""

    def wide(given: Any) -> Any:
        return torch.float64 if given is torch.float32 else given

    if node.op == "call_method" and node.target == "float":
        node.target = "double"
    node.args = tuple(map(wide, node.args))
    node.kwargs = {name: wide(given) for name, given in node.kwargs.items()}

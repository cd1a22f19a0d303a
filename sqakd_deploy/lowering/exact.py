"""A student in its integers' arithmetic: in PyTorch, what integer kernels answer, bit for bit.

A student in training simulates: it sums products of real numbers in float32, in an order of the
library's choosing, and where a sum comes to lie beside the border of two codes, rounding alone
decides on which side. Deep students carry that on, so that a simulation is not even itself in
another order of its sums. Integer kernels have no such choice. Their sums are exact, and each is
rounded by few operations, all known: with the accumulator ``a`` (an integer), the input's scale
``s_x``, a channel's ``s_w`` and the step ``s_y`` of the quantizer behind the layer, ONNX Runtime's
QLinearConv, QGemm and QLinearMatMul compute in float32

    ``r = (s_x · s_w) / s_y``,  ``q = round_half_even(float32(a) · r) + zero_point``

and cut ``q`` to the type. :func:`in_integers` computes the same. Means of codes are exact as well.
Everything else is float32's as in the student, operation by operation as runtimes have it. For sums
and products of codes kernels use other operations in another order, which is the same where no code
lies beside a border (:mod:`~sqakd_deploy.lowering.borders` sees to that); in functions that stay in
float (a softmax, LayerNorm), rounding may still decide.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.lowering.folding import affine_of, weight_and_bias
from sqakd_deploy.lowering.integer import lowered
from sqakd_deploy.lowering.lowerable import Lowered, without_form
from sqakd_deploy.modes import in_plain_mode
from sqakd_deploy.quantization import BATCH_NORMS
from sqakd_deploy.quantizers import WeightQuantizer
from sqakd_deploy.tracing.lifting import free_name
from sqakd_deploy.tracing.trace import tensor_inputs

_ORDER_KEPT = (ir.Clip, ir.Concat, *ir.DATA_MOVEMENT)
"""Nodes that give a number on as it is, or cut: steps of the quantizer behind them are no other."""

_MEANS = (ir.AveragePool, ir.GlobalAveragePool)

_EXACT = 2**24  # float32 holds all integers up to it


@in_plain_mode
@torch.no_grad()
def in_integers(student: nn.Module) -> fx.GraphModule:
    """A copy that answers as the exported file does, where the runtime computes in integers.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize` and calibrated; not changed.

    Returns:
        A module in evaluation mode, of float32 images ``(N, C, H, W)`` and logits, whose nodes have
        the student's names. It is on the student's device, or the CPU where that has no float64;
        accelerators sum in float64, on the CPU most layers need not.

    Raises:
        ModelError: if the module is no student.
        ExportError: if a layer has no integer form, naming it.
        SpecError: if the student was never calibrated.
    """
    known = lowered(student)
    exact: Any = copy.deepcopy(student)
    if next(exact.parameters()).device.type == "mps":
        exact = exact.cpu()
    for node in known.graph.nodes:
        if isinstance(node, (ir.Conv, ir.Linear)):
            if node.name in known.paths:
                _replace_layer(exact, student, known, node)
            else:
                _replace_factor(exact, known.graph, node)
        elif isinstance(node, ir.MatMul):
            _replace_product(exact, known.graph, node)
        elif isinstance(node, ir.Quantize):
            _set(exact, node.name, _Rounded(known.graph, node))
    _widen(exact, _means_of_codes(known.graph))
    return exact.eval()


def as_deployed(student: nn.Module) -> nn.Module:
    """:func:`in_integers`, or a student that has no integers as it is."""
    return student if without_form(student) is not None else in_integers(student)


class _AsItIs(nn.Module):
    """Stands for the quantizer of a weight that is rounded already."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.zero, self.bit_width = quantizer.zero, quantizer.bit_width

    def forward(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight, torch.ones_like(self.zero), self.zero, self.bit_width


class _Rounded(nn.Module):
    """Stands for an activation quantizer: real numbers to the ones that their codes stand for.

    A layer's number was rounded to float32 in steps (see :class:`_IntegerLayer`): dividing in
    float64 what was multiplied there gives it back. A quotient of float32 is what float32 has.
    """

    def __init__(self, graph: ir.IntegerGraph, node: ir.Quantize) -> None:
        super().__init__()
        grid = graph.values[node.output].grid
        assert grid is not None  # Quantize writes no other
        self.step, self.scale = float(node.step), float(grid.scale)
        self.low, self.high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point

    def forward(self, x: Tensor) -> Tensor:
        position = (x.double() / self.step).float()
        return position.round().clamp(self.low, self.high) * self.scale


class _IntegerLayer(nn.Module):
    """A layer on codes: exact sums, then float32 as the kernels have it.

    It gives float64 to quantizers, float32 to others.

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
        self.scale, self.step = float(grid.scale), None if step is None else float(step)
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
        return _real(accumulator, self.ratio.reshape(by_channel), self.step)


class _IntegerProduct(nn.Module):
    """A matrix product of codes ``(…, A, B) · (…, B, C)``, as :class:`_IntegerLayer`.

    Args:
        first: grid of the one.
        second: grid of the other.
        step: of the quantizers behind it; None where they differ or there is none.
    """

    def __init__(self, first: ir.Grid, second: ir.Grid, step: np.float32 | None) -> None:
        super().__init__()
        self.scales = float(first.scale), float(second.scale)
        product = np.float32(first.scale) * np.float32(second.scale)
        self.ratio = float(product if step is None else product / step)
        self.step = None if step is None else float(step)
        self.largest = _largest_level(first) * _largest_level(second)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, other = ((t / s).round() for t, s in zip((x, y), self.scales, strict=True))
        narrow = x.shape[-1] * self.largest < _EXACT and _float32_sums_as_written(x.device)
        dtype = torch.float32 if narrow else torch.float64
        accumulator = torch.matmul(one.to(dtype), other.to(dtype)).double().round()
        return _real(accumulator, self.ratio, self.step)


def _real(accumulator: Tensor, ratio: Tensor | float, step: float | None) -> Tensor:
    """What an exact sum stands for; in float64 for a quantizer, which divides by the step again."""
    scaled = accumulator.float() * ratio
    return scaled if step is None else scaled.double() * step


class _EachChannel(nn.Module):
    """A BatchNorm on its own, or a factor: a code for each channel of ``(N, C, …)``."""

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
        summed, weight = _each_channel(exact, node.weight)
    else:  # a transposed convolution's node has another layout than the layer
        affine = affine_of(student.get_submodule(norm)) if norm else None
        own, own_bias = weight_and_bias(student.get_submodule(path), affine, grid)
        assert isinstance(own, ir.IntWeight)
        weight, bias = own, own_bias if isinstance(own_bias, ir.IntBias) else None
        layer.weight_quant.tensor_quant = _AsItIs(layer.weight_quant.tensor_quant)
        layer.bias, summed = None, layer
        if norm is not None:
            _set(exact, norm, nn.Identity())
    _set(exact, path, _IntegerLayer(summed, weight, bias, grid, step))


def _replace_factor(exact: Any, graph: ir.IntegerGraph, node: ir.Conv | ir.Linear) -> None:
    """Put an integer layer in the place of a product of codes and a factor for each channel."""
    grid = graph.values[node.inputs[0]].grid
    assert grid is not None  # else it were no layer
    assert isinstance(node.weight, ir.IntWeight)
    summed, weight = _each_channel(exact, node.weight)
    layer = _IntegerLayer(summed, weight, None, grid, step_behind(graph, node.output))
    product = next(n for n in exact.graph.nodes if n.name == node.output)
    _replace_node(exact, product, layer, (tensor_inputs(product)[0],))


def _replace_product(exact: Any, graph: ir.IntegerGraph, node: ir.MatMul) -> None:
    """Put an integer product in the place of one of two tensors of codes."""
    first, second = (graph.values[name].grid for name in node.inputs)
    product = next(n for n in exact.graph.nodes if n.name == node.output)
    operands = product.args[:2]
    if first is None or second is None or not all(isinstance(a, fx.Node) for a in operands):
        return
    layer = _IntegerProduct(first, second, step_behind(graph, node.output))
    _replace_node(exact, product, layer, operands)


def _replace_node(exact: Any, node: fx.Node, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    path = free_name(exact, f"{node.name}_integers")
    exact.add_submodule(path, module)
    with exact.graph.inserting_after(node):
        made = exact.graph.call_module(path, inputs)
    node.replace_all_uses_with(made)
    exact.graph.erase_node(node)


def _each_channel(exact: nn.Module, weight: ir.IntWeight) -> tuple[nn.Module, ir.IntWeight]:
    """What multiplies each channel, and its codes ``(C,)``."""
    codes = weight.codes.reshape(-1)
    layer = _EachChannel(len(codes), next(exact.parameters()).device)
    return layer, ir.IntWeight(codes, weight.scale, weight.bits, weight.mid_rise)


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
    by_channel = np.abs(weight.codes.astype(np.int64)).reshape(len(weight.scale), -1).sum(axis=1)
    return int((by_channel * _largest_level(grid) + np.abs(bias.astype(np.int64))).max())


def _largest_level(grid: ir.Grid) -> int:
    return max(grid.qmax - grid.zero_point, grid.zero_point - grid.qmin)


def _float32_sums_as_written(device: torch.device) -> bool:
    """Whether convolutions add products of float32 as they are. Accelerators may sum in TF32, and
    libraries transform small kernels (Winograd): exact for real numbers, not for float32."""
    wanted = torch.get_float32_matmul_precision() == "highest"
    return device.type == "cpu" and wanted and bool(torch.backends.mkldnn.enabled)


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer a weight of its own: others may share the one it has. By way of its dictionary,
    since a Brevitas layer makes a new quantizer for each weight that it is given."""
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _means_of_codes(graph: ir.IntegerGraph) -> list[str]:
    """Names of what averages codes, which integer kernels sum exactly."""
    return [
        node.output
        for node in graph.nodes
        if isinstance(node, _MEANS) and graph.values[node.inputs[0]].grid is not None
    ]


def _widen(exact: fx.GraphModule, names: Collection[str]) -> None:
    """Let nodes sum in float64."""
    graph = exact.graph
    for node in [node for node in graph.nodes if node.name in names]:
        with graph.inserting_before(node):
            wide = graph.call_method("double", (node.all_input_nodes[0],))
        node.replace_input_with(node.all_input_nodes[0], wide)
        with graph.inserting_after(node):
            narrow = graph.call_method("float", (node,))
        node.replace_all_uses_with(narrow, lambda user, narrow=narrow: user is not narrow)
    exact.recompile()

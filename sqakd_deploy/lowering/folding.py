"""The arithmetic of folding: BatchNorm into scales, biases into int32.

BatchNorm in evaluation is ``f·x + h`` per channel with ``f = γ/√(σ² + ε)``. Behind a layer with
integer weights, ``|f|`` multiplies the channel's scale, a negative ``f`` flips the signs of its
codes, ``f = 0`` makes them zero, and the rest joins the bias: no weight is rounded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from brevitas.nn import QuantConv2d, QuantLinear
from numpy.typing import NDArray
from torch import Tensor, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ExportError
from sqakd_deploy.lowering.transposed import as_convolution
from sqakd_deploy.quantizers import WeightQuantizer

AFFINE_CODE = 127
"""Weight code of a BatchNorm on its own, written as a 1×1 depthwise convolution: the largest, so
that the accumulator's step, to which the bias is rounded, is as fine as it can be."""

_BIAS_LIMIT = 2**30
"""Largest bias code; leaves as much of int32 to the products."""

_MIN_SCALE = np.float32(1e-30)
"""Smallest weight scale: its product with an input's scale is still a normal float32."""

CodeRange: TypeAlias = tuple[np.float32, int, int]
"""A quantizer's step, zero-point and last code."""


@dataclass(frozen=True)
class Affine:
    """``factor[c] · x + shift[c]`` in float64: what a BatchNorm does in evaluation."""

    factor: NDArray[np.float64]
    shift: NDArray[np.float64]


def to_numpy(tensor: Tensor) -> NDArray[np.float64]:
    """A tensor's values in float64, on the CPU."""
    return tensor.detach().double().cpu().numpy()


def affine_of(norm: Any) -> Affine:
    """What a BatchNorm does in evaluation.

    Raises:
        ExportError: if it keeps no running statistics.
    """
    if norm.running_var is None:
        raise ExportError("a BatchNorm without running statistics depends on its batch")
    sigma = np.sqrt(to_numpy(norm.running_var) + norm.eps)
    gamma = to_numpy(norm.weight) if norm.weight is not None else np.ones_like(sigma)
    beta = to_numpy(norm.bias) if norm.bias is not None else np.zeros_like(sigma)
    factor = gamma / sigma
    return Affine(factor, beta - to_numpy(norm.running_mean) * factor)


def scaling(factor: NDArray[np.float32]) -> Affine:
    """A factor for each channel and nothing else."""
    return Affine(factor.astype(np.float64), np.zeros(len(factor)))


def fold(
    codes: NDArray[np.int8],
    scale: NDArray[np.float64],
    factor: NDArray[np.float64],
    bits: int,
    mid_rise: bool,
) -> ir.IntWeight:
    """Multiply each output channel by a factor, exactly.

    Args:
        codes: int8 ``(O, …)``.
        scale: ``(O,)``.
        factor: ``(O,)``, of any sign.
        bits: information bits of a code.
        mid_rise: the codes are odd.

    Returns:
        Codes with the factor's sign (zero where it is zero) and scales ``scale · |factor|``.
    """
    sign = np.sign(factor).astype(np.int8).reshape(-1, *[1] * (codes.ndim - 1))
    scaled = np.where(factor == 0.0, scale, scale * np.abs(factor)).astype(np.float32)
    return ir.IntWeight(codes * sign, np.maximum(scaled, _MIN_SCALE), bits, mid_rise)


def with_bias(
    weight: ir.IntWeight, bias: NDArray[np.float64], input_scale: np.float32
) -> tuple[ir.IntWeight, ir.IntBias]:
    """Encode a bias at the accumulator's scale.

    A channel that BatchNorm has all but switched off can have a bias beyond int32 in steps of its
    accumulator. Its scale is then raised until the bias fits, and its weights, which matter less
    than half a step of that bias each, are rounded to the new scale.

    Args:
        weight: of the layer.
        bias: real bias ``(O,)``.
        input_scale: of the layer's input.

    Returns:
        The weight (another one only if such a channel exists) and the bias.
    """
    needed = (np.abs(bias) / _BIAS_LIMIT / np.float64(input_scale)).astype(np.float32)
    if np.any(needed > weight.scale):
        scale = np.maximum(weight.scale, needed)
        ratio = (weight.scale.astype(np.float64) / scale).reshape(
            -1, *[1] * (weight.codes.ndim - 1)
        )
        codes = np.rint(weight.codes * ratio).astype(np.int8)
        weight = ir.IntWeight(codes, scale, weight.bits, weight.mid_rise)
    scale = np.float32(input_scale) * weight.scale
    codes32 = np.rint(bias / scale.astype(np.float64)).astype(np.int32)
    return weight, ir.IntBias(codes32, scale)


def weight_and_bias(
    module: Any, affine: Affine | None, grid: ir.Grid | None
) -> tuple[ir.Weight, ir.Bias | None]:
    """A layer's constants, with what follows it folded in.

    Args:
        module: a convolution, a transposed one or a linear layer, quantised or not.
        affine: the BatchNorm behind it.
        grid: of its input, None for floats.

    Returns:
        Weights with the output channel first: integers where the layer is quantised; its bias:
        int32 where the input is, too.
    """
    own = None if module.bias is None else to_numpy(module.bias)
    transposed = isinstance(module, nn.ConvTranspose2d)
    kernels = as_convolution(module.weight, module.groups) if transposed else module.weight
    factor = affine.factor if affine else np.ones(len(kernels))
    bias = None if own is None else own * factor
    if affine:
        bias = affine.shift + (0.0 if bias is None else bias)
    if not isinstance(module, (QuantConv2d, QuantLinear)):
        folded = to_numpy(kernels) * factor.reshape(-1, *[1] * (kernels.dim() - 1))
        return folded.astype(np.float32), None if bias is None else bias.astype(np.float32)
    quantizer: WeightQuantizer = module.weight_quant.tensor_quant
    codes, scale = quantizer.encode(module.weight)
    scales = np.broadcast_to(to_numpy(scale).reshape(-1), len(factor))
    weight = fold(codes.cpu().numpy(), scales, factor, quantizer.bits, not quantizer.has_zero)
    if grid is None or bias is None:
        return weight, None if bias is None else bias.astype(np.float32)
    return with_bias(weight, bias, grid.scale)


def set_bias(student: nn.Module, layer: str, norm: str | None, wanted: NDArray[np.float64]) -> None:
    """Give a student's layer the bias that its integers have.

    Args:
        student: changed in place.
        layer: path of the layer.
        norm: path of the BatchNorm folded into it, whose bias is set instead (its mean, if it has
            none).
        wanted: the bias ``(O,)``, or each channel's once for every place in a block.
    """
    present = bias_of(student, layer, norm)
    if present is None:
        return
    wanted = once(wanted, len(present))
    if norm is None:
        module: Any = student.get_submodule(layer)
        module.bias.copy_(torch.from_numpy(wanted))
        return
    batch_norm: Any = student.get_submodule(norm)
    if batch_norm.bias is not None:
        batch_norm.bias.add_(torch.from_numpy(wanted - present).to(batch_norm.bias.device))
    else:  # without an affine part the mean is all that can take it up; the factor is 1/σ > 0
        moved = torch.from_numpy((wanted - present) / affine_of(batch_norm).factor)
        batch_norm.running_mean.sub_(moved.to(batch_norm.running_mean.device))


def bias_of(student: nn.Module, layer: str, norm: str | None) -> NDArray[np.float64] | None:
    """What a student's layer adds to each channel ``(O,)``, the BatchNorm folded into it included;
    None if it has no bias. Arguments are as for :func:`set_bias`."""
    module: Any = student.get_submodule(layer)
    own = to_numpy(module.bias) if norm != layer and module.bias is not None else None
    if norm is None:
        return own
    affine = affine_of(student.get_submodule(norm))
    return affine.shift + (0.0 if own is None else own * affine.factor)


def once(values: NDArray[Any], count: int) -> NDArray[Any]:
    """A transposed convolution has each channel's bias once for each place in a block."""
    return values.reshape(count, -1)[:, 0]


def bounds_needed(
    low: float, high: float | None, grids: Sequence[CodeRange | None]
) -> tuple[float, float | None] | None:
    """A Clip's bounds without those that the quantizers behind it make redundant (rule 3).

    A bound that is rounded to the last code changes nothing: beyond it all is that code, too.

    Args:
        low: of the Clip.
        high: of the Clip.
        grids: of everything that reads it; None for a reader that is no quantizer.

    Returns:
        The bounds (ReLU keeps its 0), or None where neither is needed.
    """
    known = [grid for grid in grids if grid is not None]
    if not known or len(known) < len(grids):
        return low, high
    if high is not None and all(
        np.rint(np.float32(high) / step) + zero >= last for step, zero, last in known
    ):
        high = None
    below = low < 0 and all(np.rint(np.float32(low) / step) + zero <= 0 for step, zero, _ in known)
    return None if below and high is None else (low, high)

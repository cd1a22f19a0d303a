"""Nodes of an integer graph that no integer kernel computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.lowering.values import Node


@dataclass(frozen=True)
class FloatNode(Node):
    """Base of nodes without an integer kernel: computed in float, quantised only if need be."""


_Gates: TypeAlias = Literal["sigmoid", "hard_sigmoid", "hard_swish", "silu"]
_Roots: TypeAlias = Literal["reciprocal", "sqrt"]
_Units: TypeAlias = Literal["elu", "gelu", "gelu_tanh", "leaky_relu", "mish", "softplus", "tanh"]
Function: TypeAlias = _Gates | _Roots | _Units


@dataclass(frozen=True)
class Activation(FloatNode):
    """An elementwise function of one value.

    ``hard_sigmoid(x) = clip(x/6 + 1/2, 0, 1)``; ``leaky_relu(x) = max(x, slope · x)``;
    ``elu(x) = slope · (eˣ − 1)`` below 0; ``mish(x) = x · tanh(softplus(x))``.
    """

    function: Function
    slope: float = 0.0


@dataclass(frozen=True)
class LayerNorm(FloatNode):
    """``(x − mean)/√(variance + epsilon) · scale + shift`` over as many last axes as they have."""

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]
    epsilon: float


@dataclass(frozen=True)
class Softmax(FloatNode):
    """Along one axis, or its logarithm."""

    axis: int
    log: bool = False


@dataclass(frozen=True)
class MatMul(FloatNode):
    """``(N, …, A, B) · (N, …, B, C)`` of two computed values."""


@dataclass(frozen=True)
class Divide(FloatNode):
    """Elementwise quotient of two values of one rank that broadcast to the shape of one of them."""


@dataclass(frozen=True)
class Reduce(FloatNode):
    """``‖x‖₂``, ``Σ x²`` or the mean over axes, which stay with size 1."""

    function: Literal["length", "mean", "squares"]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Resize(FloatNode):
    """Bilinear interpolation of ``(N, C, H, W)``, along each axis between two neighbours.

    Entry ``i`` of an axis lies at ``(i + 1/2)/scale − 1/2`` of the input, at its first or last
    entry where that is outside, or at ``i · (size − 1)/(new size − 1)`` where ``align_corners``.

    Attributes:
        scale: new height and width over the old ones, float32: ``⌊size · scale⌋`` is the new size.
        align_corners: the corners stay where they are.
    """

    scale: tuple[np.float32, np.float32]
    align_corners: bool


@dataclass(frozen=True)
class UnitLength(FloatNode):
    """``x / max(‖x‖₂, epsilon)`` along one axis."""

    axis: int
    epsilon: float


@dataclass(frozen=True)
class WithConstant(FloatNode):
    """Base of nodes that hold a constant, which broadcasts to their output."""

    constant: NDArray[np.float32]


class Scale(WithConstant):
    """``x · constant``."""


class Shift(WithConstant):
    """``x + constant``."""


class ParametricRelu(WithConstant):
    """``max(x, 0) + constant · min(x, 0)`` (He et al., 2015)."""


class Repeat(WithConstant):
    """A constant ``(1, …)`` for each image of the batch; it reads no value."""

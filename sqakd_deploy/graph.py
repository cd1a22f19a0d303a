"""The integer graph: what every exporter writes, and the one truth about the numbers.

It is a list of nodes in topological order over named values, held in numpy and free of torch. A
value with a :class:`Grid` holds integers ``q`` that stand for ``scale · (q − zero_point)``; a value
without one holds floats. Nodes mean what their float operator means on those real numbers;
:class:`Quantize` is the only node that rounds. An exporter may therefore write each node as
``DequantizeLinear → operator`` and rely on its runtime to fuse ``… → QuantizeLinear``.

Nodes that only move data (:data:`DATA_MOVEMENT`) give their output the grid of their input, so an
exporter may run them on the integers directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

# None, the first extent, counts images, or as many parts of each (windows, positions).
Shape: TypeAlias = tuple[int | None, ...]


@dataclass(frozen=True)
class Grid:
    """Integers ``q`` in ``[qmin, qmax]`` that stand for ``scale · (q − zero_point)``.

    Attributes:
        scale: positive float32, one per tensor.
        zero_point: the integer that stands for 0, itself in ``[qmin, qmax]``.
        qmin: smallest integer.
        qmax: largest integer.
        signed: held as int8 even where uint8 would do.
    """

    scale: np.float32
    zero_point: int
    qmin: int
    qmax: int
    signed: bool = False

    @property
    def bits(self) -> int:
        """Bits that hold every code."""
        return max(1, (self.qmax - self.qmin).bit_length())

    @property
    def dtype(self) -> Literal["uint8", "int8"]:
        """The smallest 8-bit type that holds every code; unsigned where both would do, unless
        :attr:`signed`."""
        return "uint8" if self.qmin >= 0 and not self.signed else "int8"

    @property
    def fills_dtype(self) -> bool:
        """Whether the range is that of the type, so that saturation alone enforces it."""
        return (self.qmin, self.qmax) == ((0, 255) if self.dtype == "uint8" else (-128, 127))


@dataclass(frozen=True)
class Value:
    """A named tensor of the graph.

    Attributes:
        name: unique in the graph.
        shape: ``(None, C, H, W)`` or ``(None, C)``.
        grid: the integers it holds, or None for floats.
    """

    name: str
    shape: Shape
    grid: Grid | None = None


@dataclass(frozen=True)
class IntWeight:
    """Integer weights, output channel first, zero-point 0.

    The real weight of channel ``c`` is ``scale[c] · codes[c]``, with BatchNorm already folded in.

    Attributes:
        codes: int8 ``(O, I/groups, kH, kW)`` or ``(O, I)``.
        scale: positive float32 ``(O,)``.
        bits: information bits of a code.
        mid_rise: codes are the odd integers ``2k − (2^bits − 1)`` of a grid without zero.
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int
    mid_rise: bool


@dataclass(frozen=True)
class IntBias:
    """Bias of an integer layer: the real bias is ``scale · codes``.

    Attributes:
        codes: int32 ``(O,)``.
        scale: float32 ``(O,)``, exactly ``input scale · weight scale`` in float32.
    """

    codes: NDArray[np.int32]
    scale: NDArray[np.float32]


Weight: TypeAlias = IntWeight | NDArray[np.float32]
Bias: TypeAlias = IntBias | NDArray[np.float32]


@dataclass(frozen=True)
class Node:
    """Base of all nodes.

    Attributes:
        name: the layer it came from, unique in the graph; shown in reports and errors.
        inputs: names of the values it reads.
        output: name of the value it writes.
    """

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Quantize(Node):
    """``q = clip(round_half_even(x / step) + zero_point, qmin, qmax)``, by the output's grid.

    The input may itself be on a grid: then it is dequantised first (a requantisation).

    Attributes:
        step: float32 that divides the input. It equals ``grid.scale`` but for quantizers that
            learn their input range and their output scale apart (EWGS).
    """

    step: np.float32


@dataclass(frozen=True)
class Conv(Node):
    """2-D convolution; padding adds real zeros.

    Attributes:
        weight: integers with scales, or plain float32.
        bias: integers, float32 or None.
        stride: ``(sH, sW)``.
        padding: ``(top, left, bottom, right)``.
        dilation: ``(dH, dW)``.
        groups: number of groups.
    """

    weight: Weight
    bias: Bias | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Linear(Node):
    """``x · Wᵀ + b`` on ``(N, I)``, with W ``(O, I)``; N may be images times positions."""

    weight: Weight
    bias: Bias | None


@dataclass(frozen=True)
class ChannelAffine(Node):
    """``scale[c] · x + shift[c]`` along axis 1, in float: a BatchNorm that nothing absorbs."""

    scale: NDArray[np.float32]
    shift: NDArray[np.float32]


@dataclass(frozen=True)
class Normalize(Node):
    """``(x / 255 − mean[c]) / std[c]`` along axis 1, each operation rounded to float32."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]


@dataclass(frozen=True)
class Clip(Node):
    """``min(max(x, low), high)``; ReLU is ``low=0, high=None``, ReLU6 ``high=6``."""

    low: float
    high: float | None


@dataclass(frozen=True)
class Add(Node):
    """Elementwise sum of two values of one rank that broadcast to the shape of one of them."""


@dataclass(frozen=True)
class Mul(Node):
    """Elementwise product of two values of one rank that broadcast, ``(N,C,1,1) · (N,C,H,W)``."""


@dataclass(frozen=True)
class Concat(Node):
    """Concatenation along ``axis``.

    Where its output is on a grid, all inputs are on that grid, and codes are put side by side.
    """

    axis: int


@dataclass(frozen=True)
class MaxPool(Node):
    """2-D max pooling; the attributes are as in ONNX."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


@dataclass(frozen=True)
class AveragePool(Node):
    """2-D average pooling; the attributes are as in ONNX."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    ceil_mode: bool
    count_include_pad: bool


@dataclass(frozen=True)
class GlobalAveragePool(Node):
    """Mean over H and W of ``(N, C, H, W)``, giving ``(N, C, 1, 1)``."""


@dataclass(frozen=True)
class Reshape(Node):
    """New shape, the output value's; its first axis holds what is left (batch stays dynamic)."""


@dataclass(frozen=True)
class Transpose(Node):
    """Permutation of the axes, batch first."""

    perm: tuple[int, ...]


@dataclass(frozen=True)
class Slice(Node):
    """``x[..., start:end:step, ...]`` on several axes; ``end`` None goes to the end."""

    axes: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int | None, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Pad(Node):
    """Real zeros before and after, one count an axis."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class FloatNode(Node):
    """Base of nodes without an integer kernel: computed in float, quantised only if need be."""


_Gates: TypeAlias = Literal["sigmoid", "hard_sigmoid", "hard_swish", "silu"]
Function: TypeAlias = _Gates | Literal["gelu", "gelu_tanh", "leaky_relu", "tanh"]


@dataclass(frozen=True)
class Activation(FloatNode):
    """``hard_sigmoid(x) = clip(x/6 + 1/2, 0, 1)``; ``leaky_relu(x) = max(x, slope · x)``."""

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


class Repeat(WithConstant):
    """A constant ``(1, …)`` for each image of the batch; it reads no value."""


DATA_MOVEMENT: tuple[type[Node], ...] = (MaxPool, Reshape, Transpose, Slice, Pad)


@dataclass(frozen=True)
class IntegerGraph:
    """A student as integers.

    Attributes:
        name: the model's name.
        nodes: in topological order; each writes one value.
        values: every value by name, the graph's input and output included.
        input: name of the input ``(None, C, H, W)``, floats, or uint8 where it has a grid.
        output: name of the output ``(None, K)``; it may be on a grid.
        metadata: what travels in the file (spec, preprocessing, class names), as strings.
    """

    name: str
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    input: str
    output: str
    metadata: Mapping[str, str] = field(default_factory=dict)

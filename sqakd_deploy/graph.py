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

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.lowering.float_nodes import (
    Activation,
    Divide,
    FloatNode,
    Function,
    LayerNorm,
    MatMul,
    ParametricRelu,
    Reduce,
    Repeat,
    Resize,
    Scale,
    Shift,
    Softmax,
    UnitLength,
    WithConstant,
)
from sqakd_deploy.lowering.values import (
    Bias,
    Grid,
    IntBias,
    IntWeight,
    Node,
    Shape,
    Value,
    Weight,
)

__all__ = [
    "DATA_MOVEMENT",
    "Activation",
    "Add",
    "AveragePool",
    "Bias",
    "ChannelAffine",
    "Clip",
    "Concat",
    "Conv",
    "Divide",
    "FloatNode",
    "Function",
    "GlobalAveragePool",
    "Grid",
    "IntBias",
    "IntWeight",
    "IntegerGraph",
    "LayerNorm",
    "Linear",
    "MatMul",
    "MaxPool",
    "Mul",
    "Node",
    "Normalize",
    "Pad",
    "ParametricRelu",
    "Quantize",
    "Reduce",
    "Repeat",
    "Reshape",
    "Resize",
    "Scale",
    "Select",
    "Shape",
    "Shift",
    "Slice",
    "Softmax",
    "Transpose",
    "UnitLength",
    "Value",
    "Weight",
    "WithConstant",
]


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
    """``min(max(x, low), high)``; ReLU is ``low=0, high=None``, ReLU6 ``high=6``.

    Without a lower bound ``low`` is minus infinity.
    """

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
    """More entries before and after, one count an axis.

    Attributes:
        before: entries in front, for each axis.
        after: entries behind.
        mode: what they are: real zeros, or, of the image, what lies behind its border as in a
            mirror (``reflect``) or the border itself (``edge``).
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    mode: Literal["constant", "reflect", "edge"] = "constant"


@dataclass(frozen=True)
class Select(Node):
    """``x[..., indices, ...]`` along one axis: any order, with repetitions."""

    axis: int
    indices: tuple[int, ...]


DATA_MOVEMENT: tuple[type[Node], ...] = (MaxPool, Reshape, Transpose, Slice, Pad, Select)


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

    def readers(self) -> Counter[str]:
        """How often each value is read; being the graph's output counts."""
        return Counter([*(name for node in self.nodes for name in node.inputs), self.output])

    def rewritten(
        self, rewrite: Callable[[Node, dict[str, Value]], Iterable[Node]]
    ) -> IntegerGraph:
        """A graph with what ``rewrite`` makes of each node, in the nodes' order.

        Args:
            rewrite: returns the nodes in a node's place, the last of which writes what it wrote;
                to the values it is given it adds those that its nodes write besides.
        """
        values = dict(self.values)
        nodes = [new for node in self.nodes for new in rewrite(node, values)]
        return replace(self, nodes=tuple(nodes), values=values)

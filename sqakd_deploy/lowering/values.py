"""What an integer graph's nodes read, hold and write: values on grids, weights and biases."""

from __future__ import annotations

from dataclasses import dataclass
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

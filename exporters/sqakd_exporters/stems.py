"""Convolutions of images in forms that are fast: pixels in blocks, or a fourth channel.

ONNX Runtime lays what a convolution reads of an image side by side, for each output, and multiplies
matrices. It copies the channels of a pixel at a time, and the matrices are slow where their length
is no multiple of four; with the three channels of an image both cost more than the products. Three
forms of the same sums cost less (rule 22 of ``docs/runtime-rules.md``):

- *blocks*: of stride 2, each block of 2×2 pixels is a pixel of twelve channels, and the kernel
  reads a quarter as many of them at stride 1, with weights of zero where it did not reach;
- *pairs*: of stride 2, two rows are one of six channels, filled up to eight with zeros: eight at a
  time are laid side by side at once;
- *filled*: a fourth channel of zeros, with weights that do not matter.

Integers are moved and zeros added: answers are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy import graph as g

_BLOCK = 2
_CHANNELS = 4
_RGB, _LANES = 3, 8  # channels of an image, and those of a pair of rows once they are filled up
_MOST = 25  # positions of a kernel that is filled: of larger ones the zeros cost what is gained
_FEW = 9  # positions of a kernel that gains as much from the fourth channel as from blocks
_PIXELS = 28 * 28  # of the output: in smaller images moving data costs what is gained


def with_fast_stems(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Give convolutions of fewer than four channels the form that is fastest.

    Args:
        graph: not changed.
    """
    return graph.rewritten(_faster)


def _faster(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
    if not (isinstance(node, g.Conv) and isinstance(node.weight, g.IntWeight) and node.groups == 1):
        return [node]
    source, output = values[node.inputs[0]], values[node.output]
    channels, *kernel = node.weight.codes.shape[1:]
    positions = int(np.prod(kernel))
    if source.grid is None or channels >= _CHANNELS or _pixels(output) < _PIXELS or positions == 1:
        return [node]
    if _can_be_in_blocks(node, node.weight, source):
        if positions > _FEW:
            return _in_blocks(node, node.weight, values)
        if channels == _RGB:
            return _in_pairs(node, node.weight, values)
    return _filled(node, node.weight, values) if positions <= _MOST else [node]


def _pixels(value: g.Value) -> int:
    return int(np.prod([extent or 0 for extent in value.shape[2:]]))


# -- a fourth channel ----------------------------------------------------------------------------


def _filled(node: g.Conv, weight: g.IntWeight, values: dict[str, g.Value]) -> tuple[g.Pad, g.Conv]:
    """Real zeros behind the channels, and weights for them.

    They multiply nothing. A grid without zero has other codes for them; the least of its own leaves
    a channel as narrow as it is: all are zero in one that BatchNorm switches off.
    """
    source, output = values[node.inputs[0]], f"{node.output}/filled"
    more = _CHANNELS - weight.codes.shape[1]
    values[output] = g.Value(output, (source.shape[0], _CHANNELS, *source.shape[2:]), source.grid)
    pad = g.Pad(f"{node.name}/fill", node.inputs, output, (0, 0, 0, 0), (0, more, 0, 0))
    flat = weight.codes.reshape(len(weight.codes), -1)
    least = np.abs(flat.astype(np.int16)).argmin(axis=1)
    code = flat[np.arange(len(flat)), least] if weight.mid_rise else np.zeros(len(flat), np.int8)
    zeros = np.broadcast_to(code.reshape(-1, 1, 1, 1), (len(flat), more, *weight.codes.shape[2:]))
    codes = np.concatenate([weight.codes, zeros], axis=1)
    return pad, replace(node, inputs=(output,), weight=replace(weight, codes=codes))


# -- blocks of pixels ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a kernel, in blocks.

    Attributes:
        blocks: that it reads for an output.
        before: of them in front of the output's own block, which are the padding as well.
        offset: of its first row in the first of them.
        block: rows of one.
    """

    blocks: int
    before: int
    offset: int
    block: int = _BLOCK

    @classmethod
    def of(cls, size: int, padding: int, block: int = _BLOCK) -> _Axis:
        """Of a kernel of so many rows, behind so many of padding."""
        before = -(-padding // block)
        last = (size - 1 - padding) // block
        return cls(before + last + 1, before, block * before - padding, block)

    def behind(self, outputs: int, blocks: int) -> int:
        """Blocks of padding that the last output reads behind an image of so many blocks."""
        return outputs - 1 + self.blocks - self.before - blocks


def _can_be_in_blocks(node: g.Conv, weight: g.IntWeight, source: g.Value) -> bool:
    """Whether blocks fit, and the weights' grid has the zeros."""
    even = all(extent is not None and extent % _BLOCK == 0 for extent in source.shape[2:])
    strides = (node.stride, node.dilation) == ((_BLOCK, _BLOCK), (1, 1))
    return even and strides and not weight.mid_rise


def _in_blocks(node: g.Conv, weight: g.IntWeight, values: dict[str, g.Value]) -> tuple[g.Node, ...]:
    """A convolution of blocks at stride 1, behind nodes that only move data.

    Rows are moved first, as a whole; columns with the channels, which runtimes of channels-last
    kernels move anyway.
    """
    _, inner, high, columns = _pairs(values[node.inputs[0]])
    wide = columns // _BLOCK
    steps: list[_Step] = [
        ("pixels", (high, columns, inner), (0, 2, 3, 1)),
        ("blocks", (high, wide, _BLOCK * inner), None),
        ("channels", (_BLOCK * inner, high, wide), (0, 3, 1, 2)),
    ]
    moved = _moved(node, [*_joined_rows(values[node.inputs[0]]), *steps], values)
    down, across = values[node.output].shape[2:]
    (height, width), (top, left) = weight.codes.shape[2:], node.padding[:2]
    rows, over = _Axis.of(height, top), _Axis.of(width, left)
    bottom, right = rows.behind(down or 0, high), over.behind(across or 0, wide)
    conv = replace(
        node,
        inputs=(moved[-1].output,),
        weight=replace(weight, codes=_of_blocks(weight.codes, rows, over)),
        stride=(1, 1),
        padding=(rows.before, over.before, bottom, right),
    )
    return *moved, conv


def _in_pairs(node: g.Conv, weight: g.IntWeight, values: dict[str, g.Value]) -> tuple[g.Node, ...]:
    """A convolution of pairs of rows, filled up."""
    source = values[node.inputs[0]]
    batch, inner, high, columns = _pairs(source)
    moved = _moved(node, _joined_rows(source), values)
    more, output = _LANES - inner, f"{node.output}/filled"
    values[output] = g.Value(output, (batch, _LANES, high, columns), source.grid)
    filled = (moved[-1].output,)
    pad = g.Pad(f"{node.name}/fill", filled, output, (0, 0, 0, 0), (0, more, 0, 0))
    height, width = weight.codes.shape[2:]
    top, left, _, right = node.padding
    rows = _Axis.of(height, top)
    codes = _of_blocks(weight.codes, rows, _Axis(width, left, 0, 1))
    conv = replace(
        node,
        inputs=(output,),
        weight=replace(weight, codes=np.pad(codes, ((0, 0), (0, more), (0, 0), (0, 0)))),
        stride=(1, _BLOCK),
        padding=(rows.before, left, rows.behind(values[node.output].shape[2] or 0, high), right),
    )
    return *moved, pad, conv


_Step: TypeAlias = "tuple[str, tuple[int, ...], tuple[int, ...] | None]"
"""What a step is called, its result without the batch, and the order of axes where it moves any."""


def _pairs(source: g.Value) -> tuple[int | None, int, int, int]:
    """The shape of an image whose rows are joined by two."""
    batch, *fixed = source.shape
    channels, rows, columns = (extent or 0 for extent in fixed)  # 0: see _can_be_in_blocks
    return batch, _BLOCK * channels, rows // _BLOCK, columns


def _joined_rows(source: g.Value) -> list[_Step]:
    _, inner, high, columns = _pairs(source)
    channels = inner // _BLOCK
    return [
        ("rows", (channels, high, _BLOCK, columns), None),
        ("rows_first", (_BLOCK, channels, high, columns), (0, 3, 1, 2, 4)),
        ("rows_joined", (inner, high, columns), None),
    ]


def _moved(node: g.Conv, steps: Iterable[_Step], values: dict[str, g.Value]) -> list[g.Node]:
    """The nodes that move what a convolution reads."""
    (name,) = node.inputs
    batch, grid = values[name].shape[0], values[name].grid
    nodes: list[g.Node] = []
    for step, shape, order in steps:
        output, called = f"{node.output}/{step}", f"{node.name}/{step}"
        values[output] = g.Value(output, (batch, *shape), grid)
        nodes.append(
            g.Reshape(called, (name,), output)
            if order is None
            else g.Transpose(called, (name,), output, order)
        )
        name = output
    return nodes


def _of_blocks(codes: NDArray[np.int8], rows: _Axis, columns: _Axis) -> NDArray[np.int8]:
    """Weights ``(O, C, kH, kW)`` of blocks ``(O, column · row · C, bH, bW)``."""
    outputs, channels, height, width = codes.shape
    extents = rows.block * rows.blocks, columns.block * columns.blocks
    made = np.zeros((outputs, channels, *extents), np.int8)
    high, wide = rows.offset + height, columns.offset + width
    made[:, :, rows.offset : high, columns.offset : wide] = codes
    split = made.reshape(outputs, channels, rows.blocks, rows.block, columns.blocks, columns.block)
    moved = split.transpose(0, 5, 3, 1, 2, 4)
    return np.ascontiguousarray(moved.reshape(outputs, -1, rows.blocks, columns.blocks))

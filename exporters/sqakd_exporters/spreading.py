"""Factors and terms for each channel with a number for each entry, for OpenVINO (rule O18).

OpenVINO makes a constant that differs by channels alone part of the rounding behind it, and then
moves that in front of a Reshape or Transpose before it, where channels are others. The constant is
stored by channels; what spreads it is folded at load.
"""

from __future__ import annotations

import numpy as np

from sqakd_deploy import graph as g
from sqakd_exporters.forms import as_float
from sqakd_exporters.writer import Writer


def spread_scale(writer: Writer, node: g.Scale) -> None:
    """Mul by a constant of the size of an image's value."""
    _spread(writer, node, "Mul")


def spread_shift(writer: Writer, node: g.Shift) -> None:
    """Add of a constant of the size of an image's value."""
    _spread(writer, node, "Add")


def _spread(writer: Writer, node: g.Scale | g.Shift, operator: str) -> None:
    constant = writer.constant(f"{node.name}/constant", node.constant)
    shape = writer.graph.values[node.output].shape
    if _by_channel(np.shape(node.constant), shape):
        sizes = writer.integers(f"{node.name}/sizes", [1, *(extent or 0 for extent in shape[1:])])
        constant = writer.op("Expand", [constant, sizes], f"{node.name}/spread")
    as_float(writer, node, operator, constant)


def _by_channel(sizes: tuple[int, ...], shape: g.Shape) -> bool:
    """Whether a constant of such a size differs along the second axis alone."""
    sizes = (1,) * (len(shape) - len(sizes)) + sizes
    return sizes[1] > 1 and not any(size > 1 for size in sizes[2:]) and None not in shape[1:]

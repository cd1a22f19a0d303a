"""Factors and terms for each channel with a number for each entry, for OpenVINO (rule O18).

OpenVINO makes a constant that differs by channels alone part of the rounding behind it, and then
moves that in front of a Reshape or Transpose before it, where channels are others; with bounds
behind it, it bounds other numbers. The constant is stored by channels; what spreads it is folded at
load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_exporters.forms import as_float, as_normalised, statistics_of
from sqakd_exporters.writer import Writer


def spread_scale(writer: Writer, node: g.Scale) -> None:
    """Mul by a constant of the size of an image's value."""
    _spread(writer, node, "Mul")


def spread_shift(writer: Writer, node: g.Shift) -> None:
    """Add of a constant of the size of an image's value."""
    _spread(writer, node, "Add")


def spread_normalize(writer: Writer, node: g.Normalize) -> None:
    """Div, Sub and Div by constants of the size of an image."""
    shape = writer.graph.values[node.output].shape
    constants = statistics_of(writer, node)
    if _by_channel((len(node.mean), 1, 1), shape):
        constants = [_for_each_entry(writer, node, constant) for constant in constants]
    as_normalised(writer, node, *constants)


def _spread(writer: Writer, node: g.Scale | g.Shift, operator: str) -> None:
    constant = writer.constant(f"{node.name}/constant", node.constant)
    if _by_channel(np.shape(node.constant), writer.graph.values[node.output].shape):
        constant = _for_each_entry(writer, node, constant)
    as_float(writer, node, operator, constant)


def _for_each_entry(writer: Writer, node: g.Node, constant: ir.Value) -> ir.Value:
    """A constant of the size of what a node writes of one image; what spreads it is folded."""
    shape = writer.graph.values[node.output].shape
    sizes = writer.integers(f"{node.name}/sizes", [1, *(extent or 0 for extent in shape[1:])])
    return writer.op("Expand", [constant, sizes], f"{constant.name}/spread")


def _by_channel(sizes: tuple[int, ...], shape: g.Shape) -> bool:
    """Whether a constant of such a size differs along the second axis alone."""
    sizes = (1,) * (len(shape) - len(sizes)) + sizes
    return sizes[1] > 1 and not any(size > 1 for size in sizes[2:]) and None not in shape[1:]

"""Forms that the nodes of several kinds share."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_exporters.writer import Writer

_CONV_DEFAULTS = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
"""What ONNX takes for granted."""


def as_float(
    writer: Writer, node: g.Node, op_type: str, *more: ir.Value, **attributes: Any
) -> None:
    """A float operator on real values; a Quantize behind it lets a runtime fuse it (rule 1)."""
    output = writer.op(op_type, [*writer.real(node), *more], node.output, node.name, **attributes)
    writer.hold(node, output, grid=None)


def as_conv(writer: Writer, node: g.Conv, *constants: ir.Value) -> None:
    """Conv of a weight and perhaps a bias."""
    given = {
        "strides": node.stride,
        "pads": node.padding,
        "dilations": node.dilation,
        "group": node.groups,
    }
    if writer.packed:
        given = {name: value for name, value in given.items() if value != _CONV_DEFAULTS[name]}
    as_float(writer, node, "Conv", *constants, **given)


def as_moved(
    writer: Writer, node: g.Node, op_type: str, *more: ir.Value, **attributes: Any
) -> None:
    """An operator that only moves data, on the integers themselves where there are any.

    Both sides then have one scale and zero-point whatever a runtime fuses (rule 9).
    """
    held = writer.held(node)
    output = writer.op(op_type, [held, *more], node.output, node.name, **attributes)
    writer.hold(node, output, writer.grid(node))

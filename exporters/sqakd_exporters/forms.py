"""Forms that the nodes of several kinds share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_exporters.writer import Writer

_CONV_DEFAULTS = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
"""What ONNX takes for granted."""


def as_float(
    writer: Writer, node: g.Node, op_type: str, *more: ir.Value | None, **attributes: Any
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


def kept_in_float(emit: Callable[[Writer, Any], None]) -> Callable[[Writer, Any], None]:
    """An emitter of layers whose float weights stay float.

    ONNX Runtime makes int8 of a float weight between two quantizers by itself (its
    WeightBiasQuantization), up to two steps off where it was measured: a Max of one value, which it
    leaves alone, keeps the layer and the quantizer behind it apart.
    """

    def emitter(writer: Writer, node: g.Conv | g.Linear) -> None:
        emit(writer, node)
        rounded = writer.grid(node) is not None and quantizers_behind(writer.graph, node)
        if isinstance(node.weight, g.IntWeight) or not rounded:
            return
        result = writer.held_value(node.output)
        apart = writer.op("Max", [result], f"{node.output}/apart", f"{node.name}/apart")
        writer.hold(node, apart, grid=None)

    return emitter


def quantizers_behind(graph: g.IntegerGraph, node: g.Node) -> list[g.Quantize]:
    """Those that read a node's output, perhaps behind a Clip."""
    readers = [reader for reader in graph.nodes if node.output in reader.inputs]
    clipped = {reader.output for reader in readers if isinstance(reader, g.Clip)}
    readers += [reader for reader in graph.nodes if clipped & {*reader.inputs}]
    return [reader for reader in readers if isinstance(reader, g.Quantize)]


def as_moved(
    writer: Writer, node: g.Node, op_type: str, *more: ir.Value, **attributes: Any
) -> None:
    """An operator that only moves data, on the integers themselves where there are any.

    Both sides then have one scale and zero-point whatever a runtime fuses (rule 9).
    """
    held = writer.held(node)
    output = writer.op(op_type, [held, *more], node.output, node.name, **attributes)
    writer.hold(node, output, writer.grid(node))


def statistics_of(writer: Writer, node: g.Normalize) -> list[ir.Value]:
    """Mean and standard deviation of each channel, as constants ``(C, 1, 1)``."""
    return [
        writer.constant(f"{node.name}/{name}", array.reshape(-1, 1, 1))
        for name, array in (("mean", node.mean), ("std", node.std))
    ]


def as_normalised(writer: Writer, node: g.Normalize, mean: ir.Value, std: ir.Value) -> None:
    """Div, Sub and Div, as training computes it: a product with 1/std would round otherwise."""
    (value,) = writer.real(node)
    whole = writer.constant(f"{node.name}/whole", np.array(255, np.float32))
    scaled = writer.op("Div", [value, whole], f"{node.output}/scaled")
    centred = writer.op("Sub", [scaled, mean], f"{node.output}/centred")
    writer.hold(node, writer.op("Div", [centred, std], node.output, node.name), grid=None)

"""Codes that are rounded to another grid, in the form that ONNX Runtime has an integer kernel for.

A ``DequantizeLinear`` with a ``QuantizeLinear`` behind it is two passes in ONNX Runtime, through
float32 in memory. With a product by one between them it is a ``QLinearMul``, one pass over bytes.
That multiplies by the ratio of the scales where the pair multiplies and divides, and adds
zero-points before it rounds, so that a code on the border of two levels could fall otherwise: all
codes of 8 bits are tried, and where one lies so, the pair stays.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_exporters.qdq import quantize_real
from sqakd_exporters.writer import Writer

_ONE = "one"  # name of the factor's constants

# The kernel adds up products of codes and zero-points with the ratio, in float32: a few operations,
# each off by half a unit in the last place, 2⁻²⁴ of the largest number among them. Twice as much is
# kept away from.
_RESOLUTION = 6 * 2.0**-24


def quantize(writer: Writer, node: g.Quantize) -> None:
    """As :func:`sqakd_exporters.qdq.quantize`, of codes by way of a product by one."""
    source, target = writer.grid(node), writer.graph.values[node.output].grid
    (real,) = writer.real(node)
    if source is not None and target is not None and rounds_alike(source, node.step, target):
        real = writer.op("Mul", [real, _one(writer)], f"{node.output}/real")
    quantize_real(writer, node, real)


def rounds_alike(source: g.Grid, step: np.float32, target: g.Grid) -> bool:
    """Whether every code falls to one level, whatever the order of float32 operations.

    Args:
        source: the grid of the codes.
        step: that reals are divided by.
        target: the grid that they are rounded to.
    """
    limits, ratio = np.iinfo(source.dtype), float(source.scale) / float(step)
    codes = np.arange(limits.min, limits.max + 1, dtype=np.float64)
    positions = (codes - source.zero_point) * ratio
    from_border = np.abs(positions - np.floor(positions) - 0.5)
    largest = (np.abs(codes) + abs(source.zero_point)) * ratio + abs(target.zero_point)
    return bool((from_border > _RESOLUTION * largest).all())


def _one(writer: Writer) -> ir.Value:
    """One, as a code of 8 bits."""
    constants = {"code": np.uint8(1), "scale": np.float32(1.0), "zero_point": np.uint8(0)}
    values = [writer.constant(f"{_ONE}/{name}", np.array(v)) for name, v in constants.items()]
    return writer.op("DequantizeLinear", values, _ONE)

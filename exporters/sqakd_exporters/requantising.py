"""Codes that are rounded to another grid, in the form that ONNX Runtime has an integer kernel for.

A ``DequantizeLinear`` with a ``QuantizeLinear`` behind it is two passes in ONNX Runtime, through
float32 in memory. With a sum with zero between them it is a ``QLinearAdd``, one pass over bytes.
That multiplies by the ratio of the scales where the pair multiplies and divides, and adds
zero-points before it rounds, so that a code on the border of two levels could fall otherwise: all
codes of 8 bits are tried, and where one lies so, the pair stays.

Where nothing is negative, the levels are moved to the top of the type: it saturates where a Clip
would cut, and the Clip, another pass, is saved.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sqakd_deploy import graph as g
from sqakd_exporters.qdq import quantize_real
from sqakd_exporters.writer import Writer

_NOTHING = "nothing"  # name of the term's constants
_TOO_FAR = 2.0**30  # steps: kernels round to int32, which does not saturate
_HIGHEST = 255  # of uint8
_SATURATES_NOWHERE = 64  # the largest weights that are so, whatever uint8 codes they meet (rule 19)


def with_levels_at_the_top(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Let the type's saturation cut what is rounded anew and not negative.

    Levels ``0 … n`` with zero-point 0 are ``255 − n … 255`` with zero-point ``255 − n``. That is
    done where layers alone read them, whose weights are too small for kernels to saturate (rule
    19); nodes that move data would have to follow.

    Args:
        graph: not changed; its grids are unsigned.
    """
    readers: dict[str, list[g.Node]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            readers[name].append(node)
    values = dict(graph.values)
    for node in graph.nodes:
        shifted = _shifted(graph, node) if isinstance(node, g.Quantize) else None
        if shifted is not None and all(_takes_any_codes(r) for r in readers[node.output]):
            values[node.output] = replace(values[node.output], grid=shifted)
    return replace(graph, values=values)


def quantize(writer: Writer, node: g.Quantize) -> None:
    """As :func:`sqakd_exporters.qdq.quantize`, of codes by way of a sum with zero."""
    grids = _grids(writer.graph, node)
    (real,) = writer.real(node)
    if grids is None or not rounds_alike(grids[0], node.step, grids[1]):
        quantize_real(writer, node, real)
        return
    total = writer.op("Add", [real, _nothing(writer)], f"{node.output}/real")
    quantize_real(writer, node, total, apart=True)


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
    if np.abs(positions).max() > _TOO_FAR:
        return False
    from_border = np.abs(positions - np.floor(positions) - 0.5)
    lowest, highest = (end - target.zero_point for end in (target.qmin, target.qmax))
    cut = (positions < lowest - 1) | (positions > highest + 1)
    safe = from_border > 2 * _rounding(codes, positions, ratio, source, target)
    return bool((safe | cut).all())


def _rounding(
    codes: NDArray[Any], positions: NDArray[Any], ratio: float, source: g.Grid, target: g.Grid
) -> NDArray[Any]:
    """How far float32 may be off, in steps: half a unit in the last place for each operation.

    The kernel computes ``ratio · code + (zero − ratio · zero of the source)``; the pair a product
    and a quotient.
    """
    term = ratio * source.zero_point
    sizes = (
        3 * np.abs(positions),  # the pair's two operations, and the ratio itself
        np.abs(term),
        np.abs(target.zero_point - term),
        ratio * np.abs(codes),
        np.abs(positions + target.zero_point),
    )
    return 2.0**-24 * np.sum(np.broadcast_arrays(*sizes), axis=0)


def _grids(graph: g.IntegerGraph, node: g.Quantize) -> tuple[g.Grid, g.Grid] | None:
    """What codes are rounded from and to, if it is codes that a node rounds."""
    source, target = (graph.values[name].grid for name in (*node.inputs, node.output))
    return None if source is None or target is None else (source, target)


def _shifted(graph: g.IntegerGraph, node: g.Quantize) -> g.Grid | None:
    """The grid at the top of the type, if nothing is below its lowest level, which is zero."""
    grids = _grids(graph, node)
    if grids is None or node.output == graph.output:
        return None
    source, target = grids
    shift = _HIGHEST - target.qmax
    shifted = replace(target, zero_point=target.zero_point + shift, qmin=0, qmax=_HIGHEST)
    none_below = source.qmin >= source.zero_point and target.qmin == target.zero_point
    return shifted if none_below and shift and rounds_alike(source, node.step, shifted) else None


def _takes_any_codes(reader: g.Node) -> bool:
    weight = reader.weight if isinstance(reader, (g.Conv, g.Linear)) else None
    return (
        isinstance(weight, g.IntWeight)
        and int(np.abs(weight.codes.astype(np.int16)).max()) <= _SATURATES_NOWHERE
    )


def _nothing(writer: Writer) -> ir.Value:
    """Zero, as a code of 8 bits."""
    constants = {"code": np.uint8(0), "scale": np.float32(1.0), "zero_point": np.uint8(0)}
    values = [writer.constant(f"{_NOTHING}/{name}", np.array(v)) for name, v in constants.items()]
    return writer.op("DequantizeLinear", values, _NOTHING)

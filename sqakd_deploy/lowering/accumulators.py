"""Whether what a layer sums fits the integer that a runtime sums it in."""

from __future__ import annotations

import math

import numpy as np

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ExportError


def check_accumulators(graph: ir.IntegerGraph, bits: int | None) -> None:
    """Refuse layers of which some input would leave the accumulator: sums wrap round unnoticed.

    Of int32 it takes some 66,000 inputs of 8-bit weights of one sign; no image need have shown it.

    Args:
        graph: of the student.
        bits: of the runtime's accumulators; None fits every sum.

    Raises:
        ExportError: naming the layer, and the bits at which its weights would do.
    """
    limit = math.inf if bits is None else 2 ** (bits - 1) - 1
    for node in graph.nodes:
        if not isinstance(node, (ir.Conv, ir.Linear)) or not isinstance(node.weight, ir.IntWeight):
            continue
        grid = graph.values[node.inputs[0]].grid
        largest = 0 if grid is None else _largest_sum(node, node.weight, grid)
        if largest > limit:
            fewer = node.weight.bits - math.ceil(math.log2(largest / limit))
            how = f"train it with fewer bits (--layer-bits {node.name}={fewer})"
            remedy = how if fewer >= 1 else "no width of its weights would do"
            raise ExportError(
                f"layer {node.name!r} can sum up to {largest}, and the runtime sums in int{bits}, "
                f"up to {limit}: {remedy}"
            )


def _largest_sum(node: ir.Conv | ir.Linear, weight: ir.IntWeight, grid: ir.Grid) -> int:
    """Of any output, in absolute value; padding, which is a real zero, adds nothing."""
    codes = weight.codes.reshape(len(weight.codes), -1).astype(np.int64)
    positive, negative = codes.clip(min=0).sum(axis=1), codes.clip(max=0).sum(axis=1)
    low, high = min(grid.qmin - grid.zero_point, 0), max(grid.qmax - grid.zero_point, 0)
    bias = node.bias.codes.astype(np.int64) if isinstance(node.bias, ir.IntBias) else 0
    sums = (positive * high + negative * low + bias, positive * low + negative * high + bias)
    return int(np.abs(sums).max())

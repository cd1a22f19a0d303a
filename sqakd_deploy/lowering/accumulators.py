"""Whether what a layer sums fits the int32 that runtimes sum it in."""

from __future__ import annotations

import numpy as np

from sqakd_deploy import graph as ir
from sqakd_deploy.errors import ExportError

_LIMIT = 2**31 - 1


def check_accumulators(graph: ir.IntegerGraph) -> None:
    """Refuse layers of which some input would leave int32, where sums wrap round unnoticed.

    It takes some 66,000 inputs of 8-bit weights of one sign; no image need have shown it.

    Raises:
        ExportError: naming the layer.
    """
    for node in graph.nodes:
        if not isinstance(node, (ir.Conv, ir.Linear)) or not isinstance(node.weight, ir.IntWeight):
            continue
        grid = graph.values[node.inputs[0]].grid
        largest = 0 if grid is None else _largest_sum(node, node.weight, grid)
        if largest > _LIMIT:
            raise ExportError(
                f"layer {node.name!r} can sum up to {largest}, and runtimes sum in int32, up to "
                f"{_LIMIT}: train it with fewer bits (--layer-bits {node.name}=7)"
            )


def _largest_sum(node: ir.Conv | ir.Linear, weight: ir.IntWeight, grid: ir.Grid) -> int:
    """Of any output, in absolute value; padding, which is a real zero, adds nothing."""
    codes = weight.codes.reshape(len(weight.codes), -1).astype(np.int64)
    positive, negative = codes.clip(min=0).sum(axis=1), codes.clip(max=0).sum(axis=1)
    low, high = min(grid.qmin - grid.zero_point, 0), max(grid.qmax - grid.zero_point, 0)
    bias = node.bias.codes.astype(np.int64) if isinstance(node.bias, ir.IntBias) else 0
    sums = (positive * high + negative * low + bias, positive * low + negative * high + bias)
    return int(np.abs(sums).max())

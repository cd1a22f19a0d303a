"""Signed grids as unsigned ones, for targets whose kernels want uint8 activations."""

from __future__ import annotations

from dataclasses import replace

from sqakd_deploy import graph as g


def as_unsigned(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Add 128 to the codes of every int8 grid; the real numbers stay what they are.

    ONNX Runtime on x86 does so itself, but only where a DequantizeLinear follows its
    QuantizeLinear directly. With a Clip, a MaxPool or a Flatten on the codes between, it changes
    one side of a layer and not the other, and the layer stays in float (rule 8). Codes that are not
    negative stay what they are: behind a ReLU the zero-point must be the type's lowest (rule 2).

    Args:
        graph: not changed.

    Returns:
        The same graph on grids with ``qmin ≥ 0``.
    """
    values = {name: _unsigned(value) for name, value in graph.values.items()}
    return replace(graph, values=values)


def _unsigned(value: g.Value) -> g.Value:
    grid = value.grid
    if grid is None or grid.dtype == "uint8":
        return value
    shift = 128 if grid.qmin < 0 else 0
    shifted = replace(
        grid,
        zero_point=grid.zero_point + shift,
        qmin=grid.qmin + shift,
        qmax=grid.qmax + shift,
        signed=False,
    )
    return replace(value, grid=shifted)

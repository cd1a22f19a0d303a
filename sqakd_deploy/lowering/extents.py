"""Shapes of what operators give, where they keep axes that PyTorch's drop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqakd_deploy import graph as ir
from sqakd_deploy.graph import Shape
from sqakd_deploy.lowering.meaning import Op

_PIXEL = (1, 1)


def joins_pixels(op: Op, sources: Iterable[tuple[Shape, Shape]]) -> bool:
    """Whether an operator joins channels of what are images of one pixel still.

    Joined as such, each has its rounding right behind it, as runtimes fuse it, and not behind the
    reshape to a vector.

    Args:
        op: the operator.
        sources: shape of each that it reads, and the traced one, which may lack axes; looked at
            only if it joins, since what is cut into several has none.
    """
    return (
        op.kind is ir.Concat
        and op.attributes["axis"] == 1
        and all(dims[2:] == _PIXEL and dims[:2] == traced[:2] for dims, traced in sources)
    )


def shape_behind(op: Op, sources: Sequence[Shape], traced: Shape) -> Shape:
    """What an operator gives: the traced shape, but for axes that PyTorch's drops and ours keeps.

    Args:
        op: the operator.
        sources: shapes of what it reads.
        traced: shape of its result.
    """
    if op.kind is ir.Clip:
        return sources[0]
    if op.kind is ir.GlobalAveragePool:
        return (*sources[0][:2], *_PIXEL)
    if op.kind is ir.Concat:  # of images of one pixel
        return traced + sources[0][len(traced) :]
    if op.kind is ir.Slice:
        return _sliced(sources[0], op.attributes)
    if op.kind is ir.Reduce:
        return _reduced(sources[0], op.attributes["axes"])
    return traced


def _sliced(dims: Shape, cut: Mapping[str, Any]) -> Shape:
    """Shape of a slice, from the attributes of :class:`sqakd_deploy.graph.Slice`."""
    found = list(dims)
    for axis, *bounds in zip(
        *(cut[key] for key in ("axes", "starts", "ends", "steps")), strict=True
    ):
        found[axis] = len(range(int(dims[axis] or 0))[slice(*bounds)])
    return tuple(found)


def _reduced(dims: Shape, axes: Collection[int]) -> Shape:
    """Shape of a reduction, whose axes stay with size 1."""
    return tuple(1 if axis in axes else extent for axis, extent in enumerate(dims))

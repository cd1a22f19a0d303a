"""Pools in a form whose kernels are right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError


def with_padding_apart(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Write average pools with ``ceil_mode`` and ``count_include_pad`` another way.

    ONNX Runtime 1.32 fuses such a pool, and its integer kernel divides the windows that hang over
    the edge by a wrong count: 75 steps off where it was measured. Where windows hang over, the
    image is padded apart and the pool no longer counts padding; a window's divisor is then what of
    it lies in the padded image, which is what it was.

    Args:
        graph: not changed.

    Returns:
        The same function, without pools that have both.

    Raises:
        ExportError: if a pool has no such form, naming it.
    """
    return graph.rewritten(_padding_apart)


def _padding_apart(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
    if not (isinstance(node, g.AveragePool) and node.ceil_mode and node.count_include_pad):
        return [node]
    wanted = values[node.output].shape[2:]
    axes = list(zip(padded_size(node, values), node.kernel, node.stride, strict=True))
    if not hangs_over(node, values):
        return [replace(node, ceil_mode=False)]
    if wanted != tuple(_rounded_up(*axis) for axis in axes):
        raise ExportError(
            f"node {node.name!r}: AveragePool with ceil_mode, count_include_pad and padding "
            f"{node.padding} has no exact form here; set ceil_mode or count_include_pad to False"
        )
    if not any(node.padding):
        return [replace(node, count_include_pad=False)]
    return padded_apart(node, values)


def with_floors(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Drop the ceil mode of pools where no window hangs over the edge (rule O4).

    torch drops a last window that would begin in the padding; other runtimes do not.

    Args:
        graph: not changed.

    Raises:
        ExportError: if more than the batch is dynamic, naming the pool.
    """
    nodes = [
        replace(node, ceil_mode=False)
        if isinstance(node, (g.AveragePool, g.MaxPool))
        and node.ceil_mode
        and not hangs_over(node, graph.values)
        else node
        for node in graph.nodes
    ]
    return replace(graph, nodes=tuple(nodes))


def hangs_over(node: g.AveragePool | g.MaxPool, values: Mapping[str, g.Value]) -> bool:
    """Whether a window of a pool in ceil mode reaches beyond the padded image.

    Raises:
        ExportError: if more than the batch is dynamic, naming the pool.
    """
    spread = node.dilation if isinstance(node, g.MaxPool) else (1, 1)
    kernel = [(size - 1) * apart + 1 for size, apart in zip(node.kernel, spread, strict=True)]
    axes = zip(padded_size(node, values), kernel, node.stride, strict=True)
    floored = tuple((extent - size) // step + 1 for extent, size, step in axes)
    return values[node.output].shape[2:] != floored


def padded_apart(node: g.AveragePool, values: dict[str, g.Value]) -> tuple[g.Pad, g.AveragePool]:
    """A pool that counts its padding, as a Pad and a pool without any.

    Args:
        node: the pool.
        values: of its graph; the padded value is added.

    Raises:
        ExportError: if more than the batch is dynamic, naming the pool.
    """
    pad = _pad(node, values)
    pool = replace(node, inputs=(pad.output,), padding=(0, 0, 0, 0), count_include_pad=False)
    return pad, pool


def _pad(node: g.AveragePool, values: dict[str, g.Value]) -> g.Pad:
    """The pool's padding as a node of its own; its value is added to ``values``."""
    source = values[node.inputs[0]]
    output = f"{node.output}/padded"
    values[output] = g.Value(output, (*source.shape[:2], *padded_size(node, values)), source.grid)
    top, left, bottom, right = node.padding
    return g.Pad(f"{node.name}/pad", node.inputs, output, (0, 0, top, left), (0, 0, bottom, right))


def padded_size(node: g.AveragePool | g.MaxPool, values: Mapping[str, g.Value]) -> tuple[int, int]:
    """Height and width of a pool's input with its padding.

    Raises:
        ExportError: if more than the batch is dynamic, naming the pool.
    """
    rows, columns = values[node.inputs[0]].shape[2:]
    if rows is None or columns is None:
        raise ExportError(f"node {node.name!r}: only the batch may be dynamic")
    top, left, bottom, right = node.padding
    return rows + top + bottom, columns + left + right


def _rounded_up(extent: int, size: int, step: int) -> int:
    """Windows of an unpadded pool in ceil mode; each starts inside the image."""
    count = -(-(extent - size) // step) + 1
    return count if (count - 1) * step < extent else count - 1

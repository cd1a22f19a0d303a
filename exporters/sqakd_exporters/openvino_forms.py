"""Integer graphs in forms that OpenVINO computes as they are written.

Each pass gives the same function another form, where OpenVINO's int8 path would change the numbers
or leave it. Rule numbers are those of ``docs/runtime-rules.md``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

from sqakd_deploy import graph as g
from sqakd_exporters.openvino_bounds import with_bounds_apart
from sqakd_exporters.pooling import padded_apart, padded_size, with_floors, with_padding_apart

_ONE = (1, 1)
_RANK = 4  # of a batch of images

_BEFORE_ROUNDING = (
    *(*g.DATA_MOVEMENT, g.AveragePool, g.Concat),
    *(g.Clip, g.Scale, g.Shift, g.ChannelAffine),
)
"""What may lie between an average pool and its quantizer without the average being rounded."""


def for_openvino(graph: g.IntegerGraph) -> g.IntegerGraph:
    """All passes of this module.

    Args:
        graph: not changed; its grids are unsigned.

    Raises:
        ExportError: if a pool has no exact form, naming it.
    """
    pooled = with_averages_kept(with_zeros_counted(with_floors(with_padding_apart(graph))))
    kept = with_requantising_kept(with_rounding_kept(pooled))
    return with_codes_rounded_at_once(with_bounds_apart(with_strides_apart(kept)))


def with_rounding_kept(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Keep sums out of convolutions whose output is rounded first (rule O2).

    OpenVINO fuses ``Conv → Quantize → Add → Quantize`` into one kernel and skips the first
    rounding: a tenth to a quarter of the sum's codes move. A 1×1 MaxPool on the codes, which
    changes nothing, keeps the two apart. Sums with a convolution that is not rounded, as students
    placed for OpenVINO have them, are fused into that one and need none.

    Args:
        graph: not changed.
    """
    readers = graph.readers()
    producers = {node.output: node for node in graph.nodes}

    def fenced(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
        if not isinstance(node, g.Add) or any(
            readers[name] == 1 and isinstance(producers.get(name), g.Conv) for name in node.inputs
        ):
            return [node]
        fences = {
            name: _fence(name, values, f"{name}/rounded")
            for name in dict.fromkeys(node.inputs)
            if readers[name] == 1 and _rounds_a_convolution(producers.get(name), producers)
        }
        inputs = [fences[name][-1].output if name in fences else name for name in node.inputs]
        return [*itertools.chain(*fences.values()), replace(node, inputs=tuple(inputs))]

    return graph.rewritten(fenced)


def _rounds_a_convolution(node: g.Node | None, producers: dict[str, g.Node]) -> bool:
    if not isinstance(node, g.Quantize):
        return False
    source = producers.get(node.inputs[0])
    while isinstance(source, (g.Clip, g.ChannelAffine)):
        source = producers.get(source.inputs[0])
    return isinstance(source, (g.Conv, g.Linear))


def _fence(name: str, values: dict[str, g.Value], output: str) -> list[g.Node]:
    """A 1×1 MaxPool, which is of images: what is none becomes one before, and is itself behind."""
    source = values[name]
    values[output] = replace(source, name=output)
    if len(source.shape) == _RANK:
        return [_pool(name, output)]
    image, pooled = f"{output}/image", f"{output}/pooled"
    batch, *fixed = source.shape
    last = math.prod(extent or 0 for extent in fixed[2:])  # 1 of none
    for made in (image, pooled):
        values[made] = g.Value(made, (batch, *(*fixed, 1)[:2], last), source.grid)
    return [
        g.Reshape(image, (name,), image),
        _pool(image, pooled),
        g.Reshape(output, (pooled,), output),
    ]


def _pool(name: str, output: str) -> g.MaxPool:
    return g.MaxPool(output, (name,), output, _ONE, _ONE, (0, 0, 0, 0), _ONE, ceil_mode=False)


def with_requantising_kept(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Keep a second rounding apart from that of a concatenation of several grids (rule O16).

    OpenVINO crashes over the two where a zero-point is not 0, a factor between them or none.

    Args:
        graph: not changed.
    """
    producers = {node.output: node for node in graph.nodes}

    def fenced(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
        again = isinstance(node, (g.Quantize, g.Scale))
        if not (again and _rounds_several_grids(producers.get(node.inputs[0]), producers, values)):
            return [node]
        fence = _fence(node.inputs[0], values, f"{node.name}/rounded")
        return *fence, replace(node, inputs=(fence[-1].output,))

    return graph.rewritten(fenced)


def _rounds_several_grids(
    node: g.Node | None, producers: dict[str, g.Node], values: dict[str, g.Value]
) -> bool:
    joined = producers.get(node.inputs[0]) if isinstance(node, g.Quantize) else None
    if not isinstance(joined, g.Concat):
        return False
    grids = {values[name].grid for name in joined.inputs}
    return len(grids) > 1 and any(grid is not None and grid.zero_point for grid in grids)


def with_codes_rounded_at_once(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Round codes to fewer levels in one kernel (rule O20).

    Where nothing is negative, OpenVINO makes bounds and rounding one FakeQuantize, which reads and
    writes float32 in another layout, with a copy in front and one behind. A ReLU there, which
    changes nothing, is a kernel of its own on the codes, with bounds and rounding inside.

    Args:
        graph: not changed; what it rounds to fewer levels is bounded before.
    """
    readers = {name: node for node in graph.nodes for name in node.inputs}

    def activated(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
        grid = values[node.inputs[0]].grid if node.inputs else None
        positive = grid is not None and grid.zero_point == 0 == grid.qmin
        if not (positive and isinstance(node, g.Clip) and _bounds_a_rounding(node, readers)):
            return [node]
        relu = f"{node.name}/positive"
        values[relu] = g.Value(relu, values[node.output].shape)
        return g.Clip(relu, node.inputs, relu, 0.0, None), replace(node, inputs=(relu,))

    return graph.rewritten(activated)


def _bounds_a_rounding(node: g.Clip, readers: dict[str, g.Node]) -> bool:
    return node.high is not None and isinstance(readers.get(node.output), g.Quantize)


def with_strides_apart(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Write strided 1×1 convolutions as a slice of the codes and a plain one (rule O5).

    OpenVINO moves such a stride forward, and where it meets the dequantisation makes a float
    MaxPool of it, with the convolution in float behind. It leaves strides alone where another
    layer reads the same value without them.

    Args:
        graph: not changed.
    """
    readers = graph.readers()

    def apart(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
        if not (isinstance(node, g.Conv) and _only_skips(node) and readers[node.inputs[0]] == 1):
            return [node]
        sliced = _slice(node, values)
        return sliced, replace(node, inputs=(sliced.output,), stride=_ONE)

    return graph.rewritten(apart)


def _only_skips(node: g.Conv) -> bool:
    codes = node.weight.codes if isinstance(node.weight, g.IntWeight) else node.weight
    return codes.shape[2:] == _ONE and node.stride != _ONE and not any(node.padding)


def _slice(node: g.Conv, values: dict[str, g.Value]) -> g.Slice:
    (name,) = node.inputs
    output = f"{node.name}/strided"
    shape = (*values[name].shape[:2], *values[node.output].shape[2:])
    values[output] = g.Value(output, shape, values[name].grid)
    return g.Slice(output, (name,), output, (2, 3), (0, 0), (None, None), node.stride)


def with_zeros_counted(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Pad average pools that count their padding in a node of its own (rule O3).

    OpenVINO's int8 pool pads with the integer 0, which is real zero only on a grid whose
    zero-point is 0.

    Args:
        graph: not changed; no pool in it has both ``ceil_mode`` and ``count_include_pad``.
    """

    def padded(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
        if isinstance(node, g.AveragePool) and _pads_off_zero(node, values):
            return padded_apart(node, values)
        return [node]

    return graph.rewritten(padded)


def _pads_off_zero(node: g.AveragePool, values: dict[str, g.Value]) -> bool:
    grid = values[node.inputs[0]].grid
    off_zero = grid is not None and grid.zero_point != 0
    return node.count_include_pad and any(node.padding) and off_zero


def with_averages_kept(graph: g.IntegerGraph) -> g.IntegerGraph:
    """Average in float what sums, products and layers read unrounded (rule O19).

    OpenVINO's int8 pool rounds averages to codes for those. One in ceil mode runs in float (rule
    O4); what no window reaches is cut off before, so that it has no more windows.

    Args:
        graph: not changed.
    """
    unrounded = _unrounded(graph)

    def kept(node: g.Node, values: dict[str, g.Value]) -> Iterable[g.Node]:
        if isinstance(node, g.AveragePool) and node.output in unrounded and not node.ceil_mode:
            return _averaged_in_float(node, values)
        return [node]

    return graph.rewritten(kept)


def _unrounded(graph: g.IntegerGraph) -> set[str]:
    """Values that come to a layer, sum or product before a quantizer."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        leads_on = isinstance(node, _BEFORE_ROUNDING) and node.output not in found
        if not (leads_on or isinstance(node, g.Quantize)):
            found |= set(node.inputs)
    return found


def _averaged_in_float(node: g.AveragePool, values: dict[str, g.Value]) -> list[g.Node]:
    nodes: list[g.Node] = []
    if node.count_include_pad and any(node.padding):
        pad, node = padded_apart(node, values)
        nodes.append(pad)
    source = values[node.inputs[0]]
    top, left, bottom, right = node.padding
    totals = padded_size(node, values)
    sizes = totals[0] - top - bottom, totals[1] - left - right
    rows, columns = (
        total - (total - kernel) % stride
        for total, kernel, stride in zip(totals, node.kernel, node.stride, strict=True)
    )
    reached = rows - top, columns - left
    padding = (top, left, max(reached[0] - sizes[0], 0), max(reached[1] - sizes[1], 0))
    ends = min(reached[0], sizes[0]), min(reached[1], sizes[1])
    if ends != sizes:
        output = f"{node.name}/reached"
        values[output] = g.Value(output, (*source.shape[:2], *ends), source.grid)
        nodes.append(g.Slice(output, node.inputs, output, (2, 3), (0, 0), ends, _ONE))
        node = replace(node, inputs=(output,))
    return [*nodes, replace(node, padding=padding, ceil_mode=True)]

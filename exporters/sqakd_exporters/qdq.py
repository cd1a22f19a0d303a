"""Integer graphs as QDQ ONNX models.

Every node is written as its float operator between DequantizeLinear and QuantizeLinear, in the
forms that runtimes fuse into integer kernels; nodes that only move data work on the integers.
:data:`EMITTERS` says what each kind of node becomes. A target that needs another form passes a
table of its own: ``{**EMITTERS, graph.Conv: my_conv}``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import ExportOptions
from sqakd_exporters.floats import FLOAT_EMITTERS, opset_needed
from sqakd_exporters.forms import as_conv, as_float, as_moved, as_normalised, statistics_of
from sqakd_exporters.packing import plan
from sqakd_exporters.unpacking import bias_codes, bias_scale, restore
from sqakd_exporters.writer import Emitters, Writer

OPSETS = range(13, 26)
"""Opsets that can be asked for; 13 brought DequantizeLinear per channel (rule 13)."""

_NARROW = (-64, 63)
"""Weights within do not saturate, and ONNX Runtime leaves them alone (rule 19)."""


def build_model(
    graph: g.IntegerGraph,
    options: ExportOptions,
    *,
    emitters: Emitters | None = None,
    opsets: range = OPSETS,
    packs: Collection[int] = (),
) -> ir.Model:
    """Write an integer graph as an ONNX model in memory.

    Args:
        graph: the integers.
        options: opset and names.
        emitters: what writes each kind of node; None takes :data:`EMITTERS`.
        opsets: those that the target can have; the first that will do is the default (rule 21).
        packs: bits of weights that the target restores at load (:mod:`sqakd_exporters.packing`);
            none are packed if the options forbid it.

    Raises:
        ExportError: if the opset is out of range or a node has no ONNX form, naming it.
    """
    packs = () if options.pack is False else packs
    limit = opset_limit(options, opsets)
    packed = plan(graph, packs, limit, insist=options.pack is True)
    opset = opset_for(graph, options, opsets, *(layer.opset for layer in packed.values()))
    return Writer(graph, options, opset, EMITTERS if emitters is None else emitters, packed).model()


def opset_limit(options: ExportOptions, opsets: range) -> int:
    """The highest opset that a file may have.

    Raises:
        ExportError: if the one asked for is out of range.
    """
    if options.opset is not None and options.opset not in opsets:
        raise ExportError(
            f"opset: wanted {opsets.start} to {opsets[-1]}, got {options.opset}; "
            "leave it out for the lowest that will do"
        )
    return opsets[-1] if options.opset is None else options.opset


def opset_for(graph: g.IntegerGraph, options: ExportOptions, opsets: range, *needed: int) -> int:
    """The opset asked for, or the lowest that will do (rule 21).

    Args:
        graph: the integers.
        options: of the file.
        opsets: those that the target can have.
        *needed: opsets that more than the graph needs.

    Raises:
        ExportError: if the one asked for is out of range, or too low for a node, naming it.
    """
    limit = opset_limit(options, opsets)
    lowest = max(opsets.start, opset_needed(graph, limit), *needed)
    return lowest if options.opset is None else options.opset


# -- constants of layers ----------------------------------------------------------------------


def weight(writer: Writer, node: g.Conv | g.Linear) -> ir.Value:
    """A layer's weights: int8 dequantised per channel, or float as they are."""
    name, held = f"{node.name}/weight", node.weight
    if not isinstance(held, g.IntWeight):
        return writer.constant(name, held)
    # Where the CPU has no VNNI, ONNX Runtime makes wide weights and their zero-points uint8 (rule
    # 19), and fails at constants that it has so changed for another layer.
    wide = bool(held.codes.min() < _NARROW[0] or held.codes.max() > _NARROW[1])
    packed = writer.packed.get(node.name)
    if packed:
        codes = restore(writer, name, packed)
    else:
        codes = writer.constant(name, held.codes, shared=not wide)
    if wide:
        zeros = np.zeros(len(held.scale), np.int8)
        zero_point = writer.constant(f"{name}/zero_point", zeros, shared=False)
    else:
        zero_point = writer.zeros(len(held.scale), np.int8)
    return writer.per_channel(name, codes, writer.scales(f"{name}/scale", held.scale), zero_point)


def bias(writer: Writer, node: g.Conv | g.Linear) -> list[ir.Value]:
    """A layer's bias: none, float, or int32 dequantised at the accumulator's scale.

    Raises:
        ExportError: if an integer bias has another scale. ONNX Runtime takes one that is off by up
            to 1 % (for Gemm by anything) and computes as if it were right (rule 12).
    """
    name = f"{node.name}/bias"
    if node.bias is None:
        return []
    if not isinstance(node.bias, g.IntBias):
        return [writer.constant(name, node.bias)]
    grid = writer.grid(node)
    if grid is None or not isinstance(node.weight, g.IntWeight):
        raise ExportError(f"node {node.name!r}: an int32 bias needs an integer input and weight")
    if not np.array_equal(node.bias.scale, grid.scale * node.weight.scale):
        raise ExportError(
            f"node {node.name!r}: the bias scale is not input scale × weight scale in float32"
        )
    scale = bias_scale(writer, node.name, node.weight.scale, f"{node.inputs[0]}/dq", grid)
    codes = bias_codes(writer, name, node.bias.codes)
    zeros = writer.zeros(len(node.bias.codes), np.int32)
    return [writer.per_channel(name, codes, scale, zeros)]


# -- one emitter per kind of node ------------------------------------------------------------


def quantize(writer: Writer, node: g.Quantize) -> None:
    """QuantizeLinear by the step; readers dequantise by the grid's scale, which may differ."""
    quantize_real(writer, node, writer.real(node)[0])


def quantize_real(writer: Writer, node: g.Quantize, real: ir.Value, apart: bool = False) -> None:
    """As :func:`quantize`, of the reals given, which may stand apart from codes before them."""
    grid = writer.graph.values[node.output].grid
    if grid is None:
        raise ExportError(f"node {node.name!r}: its output {node.output!r} has no grid")
    constants = writer.grid_constants(f"{node.output}/q", node.step, grid)
    clipped = not grid.fills_dtype or (not apart and _repeats(grid, writer.grid(node)))
    label = f"{node.output}/wide" if clipped else node.output
    output = writer.op("QuantizeLinear", [real, *constants], label, node.name)
    if clipped:  # rule 14: a Clip on the integers keeps every fusion
        bounds = [
            writer.constant(f"clip_{grid.dtype}_{bound}", np.array(bound, grid.dtype))
            for bound in (grid.qmin, grid.qmax)
        ]
        output = writer.op("Clip", [output, *bounds], node.output)
    writer.hold(node, output, grid)


def _repeats(grid: g.Grid, source: g.Grid | None) -> bool:
    """Whether a full 8-bit value is requantised to full 8 bits.

    ONNX Runtime replaces such a ``Q → DQ → Q → DQ`` by one pair with a scale of its own making
    (its DoubleQDQPairsRemover), which moves a fifth of the codes by a step or two. The Clip, though
    it cuts nothing, keeps the pairs apart.
    """
    return grid.fills_dtype and source is not None and source.fills_dtype


def conv(writer: Writer, node: g.Conv) -> None:
    """Conv."""
    as_conv(writer, node, weight(writer, node), *bias(writer, node))


def linear(writer: Writer, node: g.Linear) -> None:
    """Gemm with transposed weights, so that channels are on axis 0 (rule 13)."""
    as_float(writer, node, "Gemm", weight(writer, node), *bias(writer, node), transB=1)


def channel_affine(writer: Writer, node: g.ChannelAffine) -> None:
    """BatchNormalization with mean 0 and variance 1; a float Conv before it absorbs it."""
    statistics = {
        "scale": node.scale,
        "shift": node.shift,
        "mean": np.zeros_like(node.scale),
        "variance": np.ones_like(node.scale),
    }
    constants = [writer.constant(f"{node.name}/{name}", a) for name, a in statistics.items()]
    as_float(writer, node, "BatchNormalization", *constants, epsilon=0.0)


def normalize(writer: Writer, node: g.Normalize) -> None:
    """Div, Sub and Div, by channels."""
    as_normalised(writer, node, *statistics_of(writer, node))


def clip(writer: Writer, node: g.Clip) -> None:
    """Relu where it is one, else Clip (rules 2 and 3)."""
    if (node.low, node.high) == (0.0, None):
        as_float(writer, node, "Relu")
        return
    bounds = {"low": None if node.low == -math.inf else node.low, "high": node.high}
    constants = [
        None
        if bound is None
        else writer.constant(f"{node.name}/{side}", np.array(bound, np.float32))
        for side, bound in bounds.items()
    ][: 1 if node.high is None else 2]
    as_float(writer, node, "Clip", *constants)


def mul(writer: Writer, node: g.Mul) -> None:
    """Mul, which fuses as Add does (rule 8)."""
    as_float(writer, node, "Mul")


def add(writer: Writer, node: g.Add) -> None:
    """Add (rule 8)."""
    as_float(writer, node, "Add")


def concat(writer: Writer, node: g.Concat) -> None:
    """Concat, of codes on one grid or of reals, whose scales may differ (rule 10)."""
    grid = writer.graph.values[node.output].grid
    if grid is None:
        as_float(writer, node, "Concat", axis=node.axis)
        return
    if any(writer.graph.values[name].grid != grid for name in node.inputs):
        raise ExportError(f"node {node.name!r}: wanted all inputs on the grid of its output")
    parts = [writer.held(node, number) for number in range(len(node.inputs))]
    writer.hold(node, writer.op("Concat", parts, node.output, node.name, axis=node.axis), grid)


def average_pool(writer: Writer, node: g.AveragePool) -> None:
    """AveragePool (rule 10)."""
    as_float(
        writer,
        node,
        "AveragePool",
        kernel_shape=node.kernel,
        strides=node.stride,
        pads=node.padding,
        ceil_mode=int(node.ceil_mode),
        count_include_pad=int(node.count_include_pad),
    )


def global_average_pool(writer: Writer, node: g.GlobalAveragePool) -> None:
    """GlobalAveragePool, which fuses where ReduceMean does not (rule 10)."""
    as_float(writer, node, "GlobalAveragePool")


def max_pool(writer: Writer, node: g.MaxPool) -> None:
    """MaxPool. It pads with the type's minimum, which never wins against a code of the image."""
    as_moved(
        writer,
        node,
        "MaxPool",
        kernel_shape=node.kernel,
        strides=node.stride,
        pads=node.padding,
        dilations=node.dilation,
        ceil_mode=int(node.ceil_mode),
    )


def reshape(writer: Writer, node: g.Reshape) -> None:
    """Flatten to two axes, else Reshape with a 0, which keeps the batch whatever it is.

    Between positions of images and rows the first axis is left to be computed.
    """
    shape = writer.graph.values[node.output].shape
    source = writer.graph.values[node.inputs[0]].shape
    kept = _size(source) == _size(shape)
    if len(shape) == 2 and kept:
        as_moved(writer, node, "Flatten", axis=1)
        return
    if None in shape[1:]:
        raise ExportError(f"node {node.name!r}: only the batch may be dynamic, got {shape}")
    sizes = [0 if kept else -1, *(extent or 0 for extent in shape[1:])]
    as_moved(writer, node, "Reshape", writer.integers(f"{node.name}/shape", sizes))


def _size(shape: g.Shape) -> int:
    """Numbers for each entry of the first axis."""
    return math.prod(extent or 0 for extent in shape[1:])


def transpose(writer: Writer, node: g.Transpose) -> None:
    """Transpose."""
    as_moved(writer, node, "Transpose", perm=node.perm)


def slice_(writer: Writer, node: g.Slice) -> None:
    """Slice."""
    ends = [np.iinfo(np.int64).max if end is None else end for end in node.ends]
    parts = {"starts": node.starts, "ends": ends, "axes": node.axes, "steps": node.steps}
    constants = [writer.integers(f"{node.name}/{part}", v) for part, v in parts.items()]
    as_moved(writer, node, "Slice", *constants)


def pad(writer: Writer, node: g.Pad) -> None:
    """Pad with real zero, which on a grid is its zero-point; that makes zero padding exact.

    Or with codes of the image, which need no such constant.
    """
    amounts = writer.integers(f"{node.name}/amounts", [*node.before, *node.after])
    if node.mode != "constant":
        as_moved(writer, node, "Pad", amounts, mode=node.mode)
        return
    grid = writer.grid(node)
    zero = np.array(0.0, np.float32) if grid is None else np.array(grid.zero_point, grid.dtype)
    as_moved(writer, node, "Pad", amounts, writer.constant(f"{node.name}/zero", zero))


def select(writer: Writer, node: g.Select) -> None:
    """Gather."""
    indices = writer.integers(f"{node.name}/indices", node.indices)
    as_moved(writer, node, "Gather", indices, axis=node.axis)


EMITTERS: Emitters = MappingProxyType(
    {
        g.Quantize: quantize,
        g.Conv: conv,
        g.Linear: linear,
        g.ChannelAffine: channel_affine,
        g.Normalize: normalize,
        g.Clip: clip,
        g.Add: add,
        g.Mul: mul,
        g.Concat: concat,
        g.AveragePool: average_pool,
        g.GlobalAveragePool: global_average_pool,
        g.MaxPool: max_pool,
        g.Reshape: reshape,
        g.Transpose: transpose,
        g.Slice: slice_,
        g.Pad: pad,
        g.Select: select,
        **FLOAT_EMITTERS,
    }
)
"""What each kind of node becomes; read-only, so that no target changes another's."""

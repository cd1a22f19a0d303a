"""Packed weights (:mod:`~sqakd_exporters.packing`) as constants and the nodes that restore them."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sqakd_deploy import graph as g
from sqakd_exporters.packing import Packed
from sqakd_exporters.writer import LEAN_CHANNELS, Writer

_CAST_SIZE = 32  # bytes of a Cast in a packed file, about
_INTEGERS = (np.int8, np.int16, np.int32)


def restore(writer: Writer, name: str, packed: Packed) -> ir.Value:
    """Write packed codes and the constant nodes that restore them, int8 in their shape.

    Args:
        writer: of the model.
        name: of the weight.
        packed: its codes.
    """
    parts = [_restore_plane(writer, name, packed, i) for i in range(len(packed.planes))]
    if packed.shift is not None:
        shift = packed.shift.reshape(-1, *[1] * (len(packed.shape) - 1))
        parts.append(writer.constant(f"{name}/shift", shift))
    return reduce(lambda a, b: writer.op("Add", [a, b], f"{name}/sum"), parts)


def bias_codes(writer: Writer, name: str, codes: NDArray[np.int32]) -> ir.Value:
    """A layer's int32 bias: in a packed file in one or two bytes a channel where they hold it.

    Args:
        writer: of the model.
        name: of the bias.
        codes: ``(O,)``.
    """
    narrow = next(kind for kind in _INTEGERS if _holds(kind, codes))
    saved = codes.nbytes - codes.size * np.dtype(narrow).itemsize
    if not writer.packed or saved <= _CAST_SIZE:
        return writer.constant(name, codes)
    held = writer.constant(name, codes.astype(narrow))
    return writer.op("Cast", [held], name, to=ir.DataType.INT32)


def bias_scale(
    writer: Writer, layer: str, weight: NDArray[np.float32], source: str, grid: g.Grid
) -> ir.Value:
    """The scale of a layer's int32 bias: in a packed file a product of two that are there anyway.

    Args:
        writer: of the model.
        layer: its name.
        weight: scale of its weights ``(O,)``.
        source: name of its input's constants.
        grid: of its input.
    """
    if not writer.packed or len(weight) < LEAN_CHANNELS:
        return writer.scales(f"{layer}/bias/scale", grid.scale * weight)
    scale, _ = writer.grid_constants(source, grid.scale, grid)
    factors = [writer.scales(f"{layer}/weight/scale", weight), scale]
    return writer.op("Mul", factors, f"{layer}/bias/scale")


def _holds(kind: type[np.signedinteger[Any]], codes: NDArray[np.int32]) -> bool:
    limits = np.iinfo(kind)
    return bool(limits.min <= codes.min() and codes.max() <= limits.max)


def _restore_plane(writer: Writer, name: str, packed: Packed, index: int) -> ir.Value:
    plane = packed.planes[index]
    low = sum(packed.planes[i].width for i in range(index))
    table = writer.constant(f"table{packed.step}_{packed.bits}_{low}", plane.table)
    part = f"{name}/{low}" if len(packed.planes) > 1 else name
    rows = writer.op("Cast", [writer.constant(part, plane.data)], f"{part}/i", to=ir.DataType.INT32)
    codes = writer.op("Gather", [table, rows], f"{part}/t")
    count = int(np.prod(packed.shape))
    if count % plane.table.shape[1]:  # the last byte is not full
        flat = writer.op("Reshape", [codes, writer.integers("flat", [-1])], f"{part}/f")
        ends = [writer.integers(f"at_{end}", [end]) for end in (0, count)]
        codes = writer.op("Slice", [flat, *ends], f"{part}/s")
    label = "x".join(map(str, packed.shape))
    shape = writer.integers(f"shape_{label}", packed.shape)
    return writer.op("Reshape", [codes, shape], f"{part}/c")

"""Weights below 8 bits, several in a byte, restored by constants that runtimes fold at load.

A code ``c`` of ``b`` bits is stored as ``k`` in ``[0, 2^b)`` and restored as

    c = step · k + base + shift[channel],

with step 1 and base ``−2^(b−1)`` for whole multiples, step 2 and base ``−(2^b − 1)`` for the odd
codes of a mid-rise grid. The shift is 0 but where a negative BatchNorm factor turned the lowest
code, ``−2^(b−1)``, into ``2^(b−1)``, which b signed bits cannot hold, or where a channel was
rescaled or switched off.

The bits of ``k`` are stored in planes of 1, 2 or 4 bits (:data:`PLANES`), so that fields fill bytes
exactly: 3 bits are a plane of 2 and one of 1. A byte is a row of a table of 256 rows, whose entries
are the restored codes themselves; the tables are shared by all layers of a width:

    Reshape(Gather(table, Cast(bytes, int32)), shape)

and planes and shift are summed in int8, without overflow on the way
(:mod:`~sqakd_exporters.unpacking`). Every runtime measured folds
this; INT4 and INT2 initializers load in few of them, shifts and masks stay float in OpenVINO
(``docs/runtime-rules.md``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError

PLANES: Mapping[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
}
"""Widths of the planes that hold codes of so many bits, lowest bits first."""

PACKED_BITS = frozenset(PLANES)
"""Bits that can be packed; 8 fill a byte anyway."""

_ADD_OPSET = 14  # ONNX's Add takes int8 from there on
_NODES_SIZE = 128  # bytes of a plane's nodes and names in a file, about


@dataclass(frozen=True)
class Plane:
    """Some bits of every code of a layer.

    Attributes:
        width: bits of a field: 1, 2 or 4.
        data: uint8 ``(ceil(codes · width / 8),)``; the first field is in the lowest bits.
        table: int8 ``(256, 8/width)``: what the fields of each byte add to their codes.
    """

    width: int
    data: NDArray[np.uint8]
    table: NDArray[np.int8]


@dataclass(frozen=True)
class Packed:
    """The codes of a layer.

    Attributes:
        bits: stored for each code.
        step: between neighbouring codes, 1 or 2.
        shape: ``(O, …)`` of the codes.
        planes: their sum, and the shift, are the codes.
        shift: int8 ``(O,)``, added to each channel; None where it is 0 everywhere.
    """

    bits: int
    step: int
    shape: tuple[int, ...]
    planes: tuple[Plane, ...]
    shift: NDArray[np.int8] | None

    @property
    def opset(self) -> int:
        """The lowest opset that can restore it."""
        return 1 if len(self.planes) == 1 and self.shift is None else _ADD_OPSET

    @property
    def saving(self) -> int:
        """Bytes that it saves of one byte a code, shared tables not counted."""
        shift = 0 if self.shift is None else self.shift.size + _NODES_SIZE
        stored = sum(plane.data.size + _NODES_SIZE for plane in self.planes)
        return int(np.prod(self.shape)) - stored - shift


def plan(
    graph: g.IntegerGraph, packs: Collection[int], opset: int | None, *, insist: bool = False
) -> dict[str, Packed]:
    """Pack every layer that gets smaller by it.

    Args:
        graph: the integers.
        packs: bits that the target folds.
        opset: of the file, None if it may be any.
        insist: fail, rather than leave a layer as bytes, where the opset is too low.

    Returns:
        Packed codes by the layer's name.

    Raises:
        ExportError: if the opset is too low and ``insist`` is set, naming the layer.
    """
    found: dict[tuple[int, int], dict[str, Packed]] = {}
    for name, weight in _weights(graph).items():
        packed = pack(weight)
        if packed is None or packed.bits not in packs or packed.saving <= 0:
            continue
        if opset is not None and packed.opset > opset:
            if insist:
                raise ExportError(
                    f"node {name!r}: packed weights of {packed.bits} bits need opset "
                    f"{packed.opset}, got {opset}; take another, or leave weights unpacked"
                )
            continue
        found.setdefault((packed.bits, packed.step), {})[name] = packed
    return {name: p for group in found.values() if _pays(group) for name, p in group.items()}


def _weights(graph: g.IntegerGraph) -> dict[str, g.IntWeight]:
    weights = {node.name: getattr(node, "weight", None) for node in graph.nodes}
    return {name: w for name, w in weights.items() if isinstance(w, g.IntWeight)}


def _pays(group: Mapping[str, Packed]) -> bool:
    """Whether layers that share their tables save more than these take."""
    tables = sum(plane.table.size for plane in next(iter(group.values())).planes)
    return sum(packed.saving for packed in group.values()) > tables


def pack(weight: g.IntWeight) -> Packed | None:
    """The codes in as many bits as the weight says, or more if they need it.

    Returns:
        None where only whole bytes hold them.
    """
    wider = [(bits, False) for bits in range(weight.bits + 1, 8)]
    for bits, mid_rise in [(weight.bits, weight.mid_rise), *wider]:
        packed = _pack(weight.codes, bits, mid_rise) if bits in PLANES else None
        if packed is not None:
            return packed
    return None


def _pack(codes: NDArray[np.int8], bits: int, mid_rise: bool) -> Packed | None:
    step, base = (2, 1 - 2**bits) if mid_rise else (1, -(2 ** (bits - 1)))
    rows = codes.reshape(len(codes), -1).astype(np.int64)
    shift = _shifts(rows, step, base, bits)
    fields, odd = np.divmod(rows - base - shift[:, None], step)
    fits = not odd.any() and np.all((fields >= 0) & (fields < 2**bits))
    if not fits or np.any(np.abs(shift) > np.iinfo(np.int8).max):
        return None
    planes, low = [], 0
    for width in PLANES[bits]:
        table = _table(width, low, step, top=low + width == bits)
        planes.append(Plane(width, _fill(fields.reshape(-1) >> low, width), table))
        low += width
    narrow = shift.astype(np.int8) if shift.any() else None
    return Packed(bits, step, codes.shape, tuple(planes), narrow)


def _shifts(rows: NDArray[np.int64], step: int, base: int, bits: int) -> NDArray[np.int64]:
    """Per channel: 0 where its codes lie on the grid, else what brings the lowest to ``k = 0``."""
    low, high = rows.min(axis=1), rows.max(axis=1)
    on_grid = (low >= base) & (high <= base + step * (2**bits - 1))
    on_grid &= np.all((rows - base) % step == 0, axis=1)
    return np.where(on_grid, 0, low - base)


def _fill(fields: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """The lowest ``width`` bits of every field, in bytes."""
    each = 8 // width
    padded = np.pad(fields & (2**width - 1), (0, -len(fields) % each)).reshape(-1, each)
    return (padded << (np.arange(each) * width)).sum(axis=1).astype(np.uint8)


def _table(width: int, low: int, step: int, *, top: bool) -> NDArray[np.int8]:
    """What a byte's fields, which are bits ``low`` and up of their ``k``, add to the codes.

    The base is shared out so that no plane and no sum of planes leaves int8: odd codes are centred
    in each plane; whole multiples have two's complement's sign in the top one.
    """
    each = 8 // width
    fields = (np.arange(256)[:, None] >> (np.arange(each) * width)) & (2**width - 1)
    if step == 2:
        return ((2 * fields - (2**width - 1)) << low).astype(np.int8)
    return ((fields - (2 ** (width - 1) if top else 0)) << low).astype(np.int8)

"""Convolutions of a file that read what their student's do, moved and filled with zeros.

Exporters may lay out an image otherwise in front of a convolution, in nodes that only move codes
and are named after it (``conv1/rows``), with weights to match: blocks of pixels for channels, more
channels. Whether that is the student's convolution is not taken from how exporters do it, but
followed number by number: every code of the image gets a number of its own, the file's nodes move
the numbers, and each weight of the file then has those that it multiplies, for all outputs. A
weight of the student has the same in one place of the file's kernel, and any other weight is zero
or multiplies none.

Strides are no constants of a student: one that gives as many outputs is taken for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.settings import DILATION, PADDING, STRIDE

ARRANGEMENT = "arrangement of what it reads, in which the student's was not found"

_OF_WINDOW = (PADDING, DILATION, STRIDE)
_MOVES = ("Pad", "Reshape", "Slice", "Transpose")

_Ids: TypeAlias = NDArray[np.int32]
"""Numbers of an image's codes, from 1 on; 0 stands for real zero."""


def as_in_the_student(file: QdqFile, layer: str, found: c.Facts, expected: c.Facts) -> c.Facts:
    """A convolution's facts with weights, padding and dilation in the student's form.

    Args:
        file: the file.
        layer: its name.
        found: its facts.
        expected: those of the student.

    Returns:
        ``found`` where nothing is moved; with :data:`ARRANGEMENT` where it is, and cannot be
        followed to what the student reads.
    """
    codes, wanted = (facts.get(c.WEIGHT_CODES, np.zeros(0)) for facts in (found, expected))
    stated = all(name in facts for facts in (found, expected) for name in _OF_WINDOW)
    if codes.ndim != 4 or wanted.ndim != 4 or codes.shape == wanted.shape or not stated:
        return found
    source, moves = _moves(file, layer)
    if not moves or file.node(layer).op_type != "Conv" or len(codes) != len(wanted):
        return found
    kept = {name: expected[name] for name in _OF_WINDOW}
    same = _weights(file, layer, source, moves, expected)
    if same is None:
        return {**found, **kept, c.WEIGHT_CODES: wanted, ARRANGEMENT: np.zeros(())}
    return {**found, **kept, c.WEIGHT_CODES: same}


def _moves(file: QdqFile, layer: str) -> tuple[str, list[NodeProto]]:
    """The value that is moved for a layer, and the nodes that do so, in order."""
    reader = file.producer(file.node(layer).input[0])
    moves: list[NodeProto] = []
    if reader is None or reader.op_type != "DequantizeLinear":
        return "", moves
    value = str(reader.input[0])
    while (node := file.producer(value)) is not None and node.name.startswith(f"{layer}/"):
        if node.op_type not in _MOVES:
            break
        moves.insert(0, node)
        value = str(node.input[0])
    return value, moves


def _weights(
    file: QdqFile, layer: str, source: str, moves: list[NodeProto], expected: c.Facts
) -> NDArray[Any] | None:
    """The file's weights where the student has them; None if the two are not one convolution."""
    found, wanted = file.constants[layer], expected[c.WEIGHT_CODES]
    given = {a.name: helper.get_attribute_value(a) for a in file.node(layer).attribute}
    shape, codes = _shape(file.model, source), found[c.WEIGHT_CODES]
    if shape is None or shape[0] != wanted.shape[1] or given.get("group", 1) != 1:
        return None
    image = np.arange(1, int(np.prod(shape)) + 1, dtype=np.int32).reshape(1, *shape)
    moved = _moved(file, source, moves, image)
    if moved is None or moved.shape[1] != codes.shape[1]:
        return None
    own = _Window.of(codes, found)
    read, wants = own.outputs(moved), _Window.of(wanted, expected).outputs(image)
    if read is None or wants is None or read.shape[3:] != wants.shape[3:]:
        return None
    return _matched(read, codes, wants, wanted)


def _shape(model: ModelProto, name: str) -> tuple[int, int, int] | None:
    """Channels, rows and columns of a value, where the file fixes them."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # whatever it raises of strangers' nodes, or of 2 GB
        return None
    known = {value.name: value for value in (*inferred.input, *inferred.value_info)}
    if name not in known:
        return None
    extents = [dim.dim_value for dim in known[name].type.tensor_type.shape.dim][1:]
    fixed = len(extents) == 3 and all(extents)
    return (extents[0], extents[1], extents[2]) if fixed else None


def _moved(file: QdqFile, source: str, moves: list[NodeProto], image: _Ids) -> _Ids | None:
    """An image's numbers as a layer reads them, 0 where real zeros are filled in; None if others
    are, or the nodes do not fit the image."""
    nodes: list[NodeProto] = []
    constants: dict[str, NDArray[Any] | None] = {}
    for node in moves:
        copy = NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "Pad" and len(node.input) > 2:
            copy.input[2] = ""  # numbers are filled with 0
        if node.op_type == "Pad" and not _fills_with_zeros(file, node):
            return None
        nodes.append(copy)
        constants |= {name: file.constant(name) for name in copy.input[1:] if name}
    if any(value is None for value in constants.values()):
        return None
    ends = [
        helper.make_tensor_value_info(name, TensorProto.INT32, None)
        for name in (source, nodes[-1].output[0])
    ]
    held = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "moves", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=file.model.opset_import)
    try:
        (found,) = ReferenceEvaluator(model).run(None, {source: image})
    except Exception:  # whatever onnx's evaluator raises of shapes that do not fit
        return None
    moved: _Ids = np.asarray(found)
    return moved if moved.ndim == 4 else None


def _fills_with_zeros(file: QdqFile, pad: NodeProto) -> bool:
    """Whether a Pad fills with what stands for zero, or with codes of the image."""
    modes = [a.s for a in pad.attribute if a.name == "mode"]
    if modes and modes != [b"constant"]:
        return True
    named = len(pad.input) > 2 and bool(pad.input[2])
    filler = file.constant(pad.input[2]) if named else np.zeros(1)
    zero = file.zero_before(pad)
    return filler is not None and filler.size == 1 and float(filler.item()) == zero


@dataclass(frozen=True)
class _Window:
    """What a convolution reads at a time.

    Attributes:
        kernel: rows and columns of it.
        padding: above, left, below, right.
        dilation: of rows and columns.
        stride: down and across.
    """

    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, codes: NDArray[Any], facts: c.Facts) -> _Window:
        """Of a convolution's weights and settings."""
        return cls(codes.shape[2:], *(tuple(map(int, facts[name])) for name in _OF_WINDOW))

    def _left(self, image: _Ids) -> list[int]:
        """Rows and columns that the window can move by."""
        top, left, bottom, right = self.padding
        extents = zip(image.shape[2:], (top + bottom, left + right), strict=True)
        spans = zip(self.kernel, self.dilation, strict=True)
        return [
            extent + more - (size - 1) * apart - 1
            for (extent, more), (size, apart) in zip(extents, spans, strict=True)
        ]

    def outputs(self, image: _Ids) -> _Ids | None:
        """A view of what each weight reads, ``(C, kH, kW, oH, oW)``; None if it does not fit."""
        steps = min(*self.dilation, *self.stride)
        if min(*self.padding, *self._left(image), steps - 1) < 0:
            return None
        top, left, bottom, right = self.padding
        padded = np.pad(image[0], ((0, 0), (top, bottom), (left, right)))
        spread = [(s - 1) * d + 1 for s, d in zip(self.kernel, self.dilation, strict=True)]
        windows = sliding_window_view(padded, spread, axis=(1, 2))
        down, across = self.dilation
        chosen = windows[:, :: self.stride[0], :: self.stride[1], ::down, ::across]
        found: _Ids = chosen.transpose(0, 3, 4, 1, 2)
        return found


def _matched(
    read: _Ids, codes: NDArray[Any], wants: _Ids, wanted: NDArray[Any]
) -> NDArray[Any] | None:
    """The file's codes in the student's order; None where they multiply other numbers."""
    rows = list(_rows(read))
    places = {row: place for place, row in enumerate(rows) if row}
    flat, left = codes.reshape(len(codes), -1), np.array([bool(row) for row in rows])
    same = wanted.reshape(len(wanted), -1).astype(np.int64)
    for weight, row in enumerate(_rows(wants)):
        if not row:
            continue  # it multiplies padding alone, whatever it is
        if row not in places:
            return None
        same[:, weight] = flat[:, places[row]]
        left[places[row]] = False
    return None if flat[:, left].any() else same.reshape(wanted.shape)


def _rows(read: _Ids) -> Iterator[bytes]:
    """What each weight reads, in a digest; nothing for zeros alone.

    Of a large image that is a hundred million numbers, so that one row is held at a time.
    """
    for place in np.ndindex(*read.shape[:3]):
        row = read[place]
        yield blake2b(np.ascontiguousarray(row).data).digest() if row.any() else b""

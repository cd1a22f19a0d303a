"""Convolutions of a file that read what their student's do, moved and filled with zeros.

Exporters may lay out an image otherwise in front of a convolution, in nodes that only move codes
and are named after it (``conv1/rows``), with weights to match: blocks of pixels for channels, more
channels. Whether that is the student's convolution is not taken from how exporters do it, but
followed number by number: every code of the image gets a number of its own, the file's nodes move
the numbers, and each weight of the file then has those that it multiplies, for all outputs. A
weight of the student has the same in one place of the file's kernel, and any other weight is zero
or multiplies none.
"""

from __future__ import annotations

from itertools import product
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.settings import DILATION, PADDING

ARRANGEMENT = "arrangement of what it reads, which is not the student's"

_MOVES = ("Pad", "Reshape", "Slice", "Transpose")
_STRIDES = tuple(product(range(1, 5), repeat=2))  # a student's, which its constants do not state

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
        ``found`` where nothing is moved; with :data:`ARRANGEMENT` where it is, and is not what the
        student reads.
    """
    codes, wanted = (facts.get(c.WEIGHT_CODES, np.zeros(0)) for facts in (found, expected))
    if codes.ndim != 4 or wanted.ndim != 4 or codes.shape == wanted.shape:
        return found
    source, moves = _moves(file, layer)
    if not moves:
        return found
    kept = {name: expected[name] for name in (PADDING, DILATION)}
    same = _weights(file, layer, source, moves, expected)
    if same is None:
        return {**found, **kept, c.WEIGHT_CODES: wanted, ARRANGEMENT: np.zeros(())}
    return {**found, **kept, c.WEIGHT_CODES: same}


def _moves(file: QdqFile, layer: str) -> tuple[str, list[NodeProto]]:
    """The value that is moved for a layer, and the nodes that do so, in order."""
    reader = file.producer(file.node(layer).input[0])
    value = "" if reader is None else str(reader.input[0])
    moves: list[NodeProto] = []
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
    conv, wanted = file.node(layer), expected[c.WEIGHT_CODES]
    given = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    shape = _shape(file.model, source)
    if shape is None or shape[0] != wanted.shape[1] or given.get("group", 1) != 1:
        return None
    image = np.arange(1, int(np.prod(shape)) + 1, dtype=np.int32).reshape(1, *shape)
    moved = _moved(file, source, moves, image)
    codes = file.constants[layer][c.WEIGHT_CODES]
    if moved is None or moved.shape[1] != codes.shape[1]:
        return None
    dilation, padding = given.get("dilations", [1, 1]), given.get("pads", [0] * 4)
    read = _read(moved, codes.shape[2:], given.get("strides", [1, 1]), padding, dilation)
    if read is None:
        return None
    for stride in _STRIDES:
        wants = _read(image, wanted.shape[2:], stride, expected[PADDING], expected[DILATION])
        if wants is not None and wants.shape[3:] == read.shape[3:]:
            same = _matched(_rows(read), codes, _rows(wants), wanted)
            if same is not None:
                return same
    return None


def _shape(model: ModelProto, name: str) -> tuple[int, int, int] | None:
    """Channels, rows and columns of a value, where the file fixes them."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*inferred.input, *inferred.value_info)}
    if name not in known:
        return None
    _, *extents = (dim.dim_value for dim in known[name].type.tensor_type.shape.dim)
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
        if node.op_type == "Pad":
            filler = file.constant(node.input[2]) if len(node.input) > 2 else None
            if filler is None or filler.item() != file.zero_before(node):
                return None
            del copy.input[2]  # numbers are filled with 0
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


def _read(image: _Ids, kernel: Any, stride: Any, padding: Any, dilation: Any) -> _Ids | None:
    """What each weight of a kernel reads, ``(C, kH, kW, oH, oW)``; None if it does not fit."""
    top, left, bottom, right = (int(count) for count in padding)
    padded = np.pad(image[0], ((0, 0), (top, bottom), (left, right)))
    spread = [(size - 1) * apart + 1 for size, apart in zip(kernel, dilation, strict=True)]
    if any(size > extent for size, extent in zip(spread, padded.shape[1:], strict=True)):
        return None
    windows = sliding_window_view(padded, spread, axis=(1, 2))
    chosen = windows[:, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    read: _Ids = chosen.transpose(0, 3, 4, 1, 2)
    return read


def _rows(read: _Ids) -> _Ids:
    """What each weight reads in a row."""
    channels, high, wide, down, across = read.shape
    return np.ascontiguousarray(read.reshape(channels * high * wide, down * across))


def _matched(
    read: _Ids, codes: NDArray[Any], wants: _Ids, wanted: NDArray[Any]
) -> NDArray[Any] | None:
    """The file's codes in the student's order; None where they multiply other numbers."""
    places = {row.tobytes(): place for place, row in enumerate(read)}
    flat, left = codes.reshape(len(codes), -1), np.ones(len(read), bool)
    same = wanted.reshape(len(wanted), -1).copy()
    for weight, row in enumerate(wants):
        if not row.any():
            continue  # it multiplies padding alone, whatever it is
        place = places.get(row.tobytes())
        if place is None:
            return None
        same[:, weight] = flat[:, place]
        left[place] = False
    multiplying = left & read.any(axis=1)
    return None if flat[:, multiplying].any() else same.reshape(wanted.shape)

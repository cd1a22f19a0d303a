"""Looks inside a session: the codes of a file's quantised tensors, as a runtime computes them.

A copy of the file answers, beside the logits, the codes of the tensors asked for, as floats in one
output: any :class:`~sqakd_deploy.exporting.Runtime` can run it. The extra readers stand behind a
QuantizeLinear (and its Clip), where they take no fusion from a layer; what is rounded in blocks of
pixels is laid out as the student has it behind them. Whether the copy still computes what the file
does is not believed but checked. Unless its logits are those of the file, but for :data:`NOISE`,
the last tensor, of which the logits are made, is asked for by itself, and the others in halves,
down to single ones; one that cannot be read without changing the logits stays unseen. What a
runtime computes inside a layer, before its QuantizeLinear, cannot be seen at all.

A session that runs a file node by node needs no copy: it is asked for the values themselves
(:class:`~sqakd_deploy.abilities.ReadableSession`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sqakd_deploy.abilities import ReadableSession
from sqakd_deploy.errors import ExportError, ParityError
from sqakd_deploy.exporting import Runtime, Session
from sqakd_deploy.lowering.subpixel import lays_out
from sqakd_deploy.verification.measures import Logits, range_step
from sqakd_deploy.verification.onnx_layers import OnnxFile, Quantized

CHUNK = 2
"""Images whose tensors are read at a time, all as floats: 21 million an image of a ResNet-50."""

NOISE = 1e-3
"""Most that a copy's logits may be off those of the file (steps of 8 bits over their range).

With low precision off, an extra reader of the last codes keeps OpenVINO from fusing products, and
floats are multiplied in another order: 4e-5 was seen. A code that changes on the way moves
quantised logits by whole steps, and float ones by far more than this. So a copy for which the
runtime takes another kernel, right where the file's is wrong, is refused, unless the wrong one
moves no logit of these images; equal bits would not tell that, either. The answers of the file
itself are compared as they are, on all images. What lies in the file, a code or a scale, lies in
the copy, too. Nor does a refused copy make a file fail: what is not read decides nothing.
"""

_PREFIX = "sqakd/tap"

_Read: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Gives, of images, logits and the values of tensors behind them, a row for each image."""


@dataclass(frozen=True)
class Seen:
    """What could be read.

    Attributes:
        codes: uint8 ``(M, …)`` by the quantizer's name, counted from the lowest code of their type.
        unseen: quantizers whose tensors cannot be read without changing the logits.
        logits: of the file itself ``(M, K)``.
        programs: how many copies of the file it took. Where two disagree on a code next to a border
            and the logits do not show it, a tensor of one does not follow from those of the other.
        moved: how far the copies' logits are from the file's, at most (steps, as :data:`NOISE`).
    """

    codes: Mapping[str, NDArray[np.uint8]]
    unseen: tuple[str, ...]
    logits: Logits
    programs: int = 1
    moved: float = 0.0


def read_codes(
    file: OnnxFile,
    runtime: Runtime,
    images: NDArray[np.float32],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    optimize: bool = True,
    session: Session | None = None,
) -> Seen:
    """Run images through a runtime and read quantised tensors on the way.

    Args:
        file: whose tensors.
        runtime: that runs it.
        images: ``(M, C, H, W)``.
        shapes: of each tensor without the batch, by its quantizer's name.
        optimize: let the runtime rewrite the graph.
        session: the file opened so; None opens it.

    Raises:
        ExportError: if the runtime cannot open or run the file.
        ParityError: if a tensor has another size than the student's, naming the first.
    """
    quantized, size = file.quantized, file.batch or CHUNK
    chunks = [images[i : i + size] for i in range(0, len(images), size)]
    session = session or runtime.open(file.path, optimize=optimize)
    plain = [session.run(chunk) for chunk in chunks]
    found: dict[str, NDArray[np.uint8]] = {}
    unseen: list[str] = []
    programs, most = 0, 0.0
    groups = [list(shapes)] if shapes else []
    while groups:
        names = groups.pop()
        wanted = [quantized[name] for name in names]
        sizes = [int(np.prod(shapes[name])) for name in names]
        try:
            with _reader(file, runtime, optimize, session, wanted, sizes) as read:
                codes, moved = _run(read, wanted, sizes, chunks, plain)
        except ExportError as error:  # the file itself ran: it is of a size
            _refuse_size(wanted, sizes, "another number", error)
            codes, moved = None, 0.0
        if codes is not None:
            programs, most = programs + 1, max(most, moved)
            found |= {n: codes[i].reshape(-1, *shapes[n]) for i, n in enumerate(names)}
        elif len(names) == 1:
            unseen += names
        else:
            cut = len(names) - 1 if len(names) == len(shapes) else len(names) // 2
            groups += [names[cut:], names[:cut]]  # the first part is next
    return Seen(found, tuple(unseen), np.concatenate(plain), programs, most)


@contextmanager
def _reader(
    file: OnnxFile,
    runtime: Runtime,
    optimize: bool,
    session: Session,
    wanted: list[Quantized],
    sizes: list[int],
) -> Iterator[_Read]:
    """What reads tensors: the session of the file itself, or one of a copy that answers them."""
    if isinstance(session, ReadableSession):
        readers = _only_readers(file.model.graph)
        laid_out = [(tensor.value, _layout(tensor.value, readers)) for tensor in wanted]
        names = [nodes[-1].output[0] if nodes else value for value, nodes in laid_out]
        yield partial(session.read, names=names)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tapped.onnx"
        onnx.save(tapped(file.model, wanted, sizes), path)
        yield runtime.open(path, optimize=optimize).run


def _run(
    read: _Read,
    wanted: list[Quantized],
    sizes: list[int],
    chunks: list[NDArray[np.float32]],
    plain: list[NDArray[np.float32]],
) -> tuple[list[NDArray[np.uint8]] | None, float]:
    """Codes ``(M, size)`` of each tensor, None if reading them moves the logits by more than noise;
    how far it moves these (steps)."""
    parts: list[list[NDArray[np.uint8]]] = [[] for _ in wanted]
    step, most = _step(plain), 0.0
    for chunk, logits in zip(chunks, plain, strict=True):
        classes = logits.shape[1]
        out = read(chunk)
        moved = _distance(out[:, :classes], logits, step)
        if not moved <= NOISE:
            return None, moved
        most = max(most, moved)
        if out.shape[1] != classes + sum(sizes):
            _refuse_size(wanted, sizes, f"{out.shape[1] - classes}")
            return None, moved
        columns = np.split(out, np.cumsum([classes, *sizes])[:-1], axis=1)[1:]
        for part, tensor, values in zip(parts, wanted, columns, strict=True):
            part.append(tensor.codes(values))
    return [np.concatenate(part) for part in parts], most


@np.errstate(invalid="ignore")
def _step(plain: list[NDArray[np.float32]]) -> float:
    return range_step(np.concatenate(plain))[0]


@np.errstate(invalid="ignore")
def _distance(found: Logits, logits: Logits, step: float) -> float:
    """How far apart logits are at most (steps); NaN where one alone is not finite."""
    if np.array_equal(found, logits, equal_nan=True):
        return 0.0
    return float(np.abs(found.astype(np.float64) - logits).max()) / step


def _refuse_size(
    wanted: list[Quantized], sizes: list[int], found: str, error: ExportError | None = None
) -> None:
    """Name a tensor of another size than the student's, once it is read alone."""
    if len(wanted) == 1:
        raise ParityError(
            f"{wanted[0].layer}: wanted {sizes[0]} codes an image, the file has {found}: what "
            "computes them is another operator than the student's"
        ) from error


def tapped(
    model: onnx.ModelProto, wanted: Iterable[Quantized], sizes: Iterable[int]
) -> onnx.ModelProto:
    """A copy of a model whose one output is ``(N, K + …)``: logits, then codes, all as floats.

    Rows are made by the sizes, codes an image: linear layers on tokens or pixels have these on the
    first axis, too. A shape that is computed from the logits makes OpenVINO lose the bias of a
    convolution before them (rule O14).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    columns = [graph.output[0].name]
    readers = _only_readers(model.graph)
    for i, (tensor, size) in enumerate(zip(wanted, sizes, strict=True)):
        real, flat = f"{_PREFIX}{i}/real", f"{_PREFIX}{i}/flat"
        graph.node.append(helper.make_node("Cast", [tensor.value], [real], to=TensorProto.FLOAT))
        for step, node in enumerate(_layout(tensor.value, readers)):
            source, real = real, f"{_PREFIX}{i}/layout{step}"
            graph.node.append(_on(node, source, real))
        rows = helper.make_tensor(f"{_PREFIX}{i}/rows", TensorProto.INT64, [2], [-1, size])
        graph.initializer.append(rows)
        graph.node.append(helper.make_node("Reshape", [real, rows.name], [flat]))
        columns.append(flat)
    graph.node.append(helper.make_node("Concat", columns, [_PREFIX], axis=1))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(_PREFIX, TensorProto.FLOAT, None))
    return copy


def _only_readers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The reader of each value that has no other."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def _layout(value: str, readers: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes that make pixels of a transposed convolution's blocks.

    Targets lay out codes, or what these are dequantised to.
    """
    found: list[onnx.NodeProto] = []
    while value in readers:
        reader = readers[value]
        if lays_out(reader.name, len(found)):
            found.append(reader)
        elif found or reader.op_type != "DequantizeLinear":
            break
        value = reader.output[0]
    return found


def _on(node: onnx.NodeProto, source: str, output: str) -> onnx.NodeProto:
    """A node that does to another value what a node of the file does to its own."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name, copy.input[0], copy.output[0] = output, source, output
    return copy

"""ONNX files, read with one error for whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_model,
    uses_external_data,
)

from sqakd_deploy.errors import ExportError


def read_onnx(path: Path, *, weights: bool = True, beside: Path | None = None) -> onnx.ModelProto:
    """Read an ONNX file.

    Args:
        path: of the file.
        weights: read those that lie in other files (ONNX's external data), too.
        beside: the file beside which these lie; None takes ``path``. What a runtime wrote elsewhere
            of a file still means those of the file.

    Raises:
        ExportError: if there is no such file, it is empty or no ONNX file, or its weights are
            missing.
    """
    if path.is_dir():
        raise ExportError(
            f"{path} is a folder; wanted an ONNX file, as sqakd-deploy export writes it of a run"
        )
    if not path.is_file():
        raise ExportError(f"there is no file {path}; sqakd-deploy export writes one")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ExportError(f"{path} is no ONNX file, or damaged: {error}") from error
    if not model.HasField("graph"):  # no bytes at all are a message without fields
        raise ExportError(f"{path} is empty, or no ONNX file")
    if weights:
        _load_weights(model, path if beside is None else beside)
    return model


def _load_weights(model: onnx.ModelProto, path: Path) -> None:
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        named = ", ".join(sorted({str(file) for file in weights_beside(model, path)}))
        raise ExportError(
            f"{path}: its weights cannot be read from {named}, which it names: {error} Put the "
            "files there"
        ) from error


def weights_beside(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The other files that hold a model's weights, each once, whether they are there or not.

    Args:
        model: read without them.
        path: of its file.
    """
    functions = [node for function in model.functions for node in function.node]
    tensors = [*_tensors(model.graph), *_held_by(functions)]
    named = (ExternalDataInfo(t).location for t in tensors if uses_external_data(t))
    return [path.parent / location for location in dict.fromkeys(named) if location]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _held_by(graph.node)


def _held_by(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in the attributes of nodes, and in the graphs there."""
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors(graph)

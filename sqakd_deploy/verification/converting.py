"""Converts a student as a file's was, to compare the two."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from torch import nn

from sqakd_deploy.errors import SpecError
from sqakd_deploy.exporting import CONVERSION_KEY, ExportOptions
from sqakd_deploy.onnx_file import read_onnx
from sqakd_deploy.pixels import INPUT_KEY
from sqakd_deploy.plugins import exporters
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.ir_file import Conversion, Converter, IrFile, differences_between
from sqakd_deploy.writing import write


def converter_of(student: nn.Module) -> Converter:
    """Holds IR to a student.

    Args:
        student: as exported.
    """
    return partial(convert, student)


def convert(student: nn.Module, file: IrFile) -> Conversion:
    """Compare IR with what OpenVINO converts a student to, by the options that the file states.

    Another version of OpenVINO, or of this package, may write another graph of the same student:
    then a difference shows nothing.

    Raises:
        ExportError: if the student cannot be written.
    """
    options = _options(file)
    metadata = {entry.key: entry.value for entry in file.model.metadata_props}
    if options is None or file.target not in exporters():
        return Conversion(file, unknown="the file does not say how it was converted")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("student.onnx", "student.xml")]
        for path in paths:
            write(student, path, file.target, True, options, metadata)
        model, made = read_onnx(paths[0]), IrFile(paths[1])
        names = {node.name for node in model.graph.node if node.name}
        found = differences_between(file, made, names)
    if found and file.converter != made.converter:
        why = (
            f"it was converted by {file.converter}, and {made.converter}, which are here, make "
            f"another graph of its run (first: {found[0]})"
        )
        return Conversion(file, unknown=why)
    if found:
        return Conversion(
            file, tuple(found), f"it is another graph than {made.converter} make of its run"
        )
    return Conversion(QdqFile(file.path, model))


def _options(file: IrFile) -> ExportOptions | None:
    """Those that a file was written with; None if it does not say."""
    stated, taken = file.stated(CONVERSION_KEY), file.stated(INPUT_KEY)
    if not isinstance(stated, dict) or not isinstance(taken, dict):
        return None
    try:
        return ExportOptions(
            opset=stated["opset"],
            pack=stated["pack"],
            input_name=taken["name"],
            output_name=file.model.graph.output[0].name,
            input_type=taken["type"],
            input_layout=taken["layout"].lower(),
            batch=taken["batch"],
        )
    except (KeyError, TypeError, AttributeError, SpecError):
        return None

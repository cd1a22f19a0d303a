"""What a file says of itself, against what its student's run says and against its own graph.

Whoever has nothing but the file prepares images and names answers by its metadata. No answer to
images that are prepared already shows that these are wrong. What a file does not say is no
difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from onnx import TensorProto

from sqakd_deploy.pixels import INPUT_KEY, PREPROCESSING_KEY
from sqakd_deploy.spec import SPEC_KEY
from sqakd_deploy.verification.constants import Difference
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.onnx_layers import OnnxFile

CLASSES_KEY = "sqakd.classes"

KEYS = (PREPROCESSING_KEY, CLASSES_KEY, SPEC_KEY)
"""Whose values are JSON and compared."""

_TYPES: Mapping[int, Mapping[str, Any]] = MappingProxyType(
    {
        TensorProto.FLOAT: {"type": "float32", "range": None, "normalisation": "caller"},
        TensorProto.UINT8: {"type": "uint8", "range": [0, 255]},
    }
)
_NCHW, _NHWC = "NCHW", "NHWC"


def metadata_differences(
    file: OnnxFile, expected: Mapping[str, str], image: Sequence[int], answers: int
) -> list[Difference]:
    """Metadata that say otherwise than the student, or than the file's own input is.

    Args:
        file: whose.
        expected: metadata of the student, JSON by key; others than this package's are left alone.
        image: shape of one prepared image.
        answers: how many logits there are to one.
    """
    pairs = [(key, json.loads(expected[key]), file.stated(key)) for key in KEYS if key in expected]
    pairs.append((INPUT_KEY, _input(file, image), file.stated(INPUT_KEY)))
    found = [(key, "value", "it is no JSON") for key, *_ in pairs if file.unreadable(key)]
    found += [
        (key, field, detail)
        for key, wanted, got in pairs
        if got is not None
        for field, detail in _contradictions("", wanted, got)
    ]
    found += _misfits(file, expected, image, answers)
    return [Difference(f"metadata {key}", field, 1, 1, detail) for key, field, detail in found]


def _misfits(
    file: OnnxFile, expected: Mapping[str, str], image: Sequence[int], answers: int
) -> Iterator[tuple[str, str, str]]:
    """What cannot be so, of what the student says nothing of."""
    names, prepared = file.stated(CLASSES_KEY), file.stated(PREPROCESSING_KEY)
    if CLASSES_KEY not in expected and isinstance(names, list) and len(names) != answers:
        yield CLASSES_KEY, "value", f"{len(names)} names in the file, for {answers} logits"
    if PREPROCESSING_KEY in expected or not isinstance(prepared, dict):
        return
    channels, size = prepared.get("channels", image[0]), prepared.get("input_size", image[1:])
    if [channels, *size] != [*image]:
        detail = f"{[channels, *size]} in the file, for images {[*image]}"
        yield PREPROCESSING_KEY, "input_size", detail


def _contradictions(field: str, wanted: Any, got: Any) -> Iterator[tuple[str, str]]:
    """Which of the fields that both have differ, and in what."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        for name in (name for name in wanted if name in got):
            yield from _contradictions(f"{field}.{name}".lstrip("."), wanted[name], got[name])
    elif wanted != got:
        yield field or "value", _detail(wanted, got)


def _detail(wanted: Any, got: Any) -> str:
    if isinstance(wanted, list) and isinstance(got, list):
        if len(wanted) != len(got):
            return f"{len(got)} in the file, {len(wanted)} in the student"
        first = next(i for i, value in enumerate(wanted) if value != got[i])
        return f"the first at {first}: {_detail(wanted[first], got[first])}"
    return f"{json.dumps(got)} in the file, {json.dumps(wanted)} in the student"


def _input(file: OnnxFile, image: Sequence[int]) -> dict[str, Any]:
    """What a file should say of its input."""
    if not file.inputs:  # which no runtime opens
        return {}
    source = file.inputs[0]
    tensor = source.type.tensor_type
    facts: dict[str, Any] = {"name": source.name, "batch": file.batch}
    if tensor.elem_type in _TYPES:
        facts |= _TYPES[tensor.elem_type]
    if file.takes_pixels and isinstance(file, QdqFile) and file.known_form:
        facts["normalisation"] = "folded" if file.takes_codes else "nodes"
    layouts = {_NCHW: tuple(image), _NHWC: (*image[1:], *image[:1])}
    extents = tuple(dim.dim_value for dim in tensor.shape.dim[1:])
    fitting = [layout for layout, shape in layouts.items() if shape == extents]
    if len(image) == 3 and len(fitting) == 1:
        facts["layout"] = fitting[0]
    return facts

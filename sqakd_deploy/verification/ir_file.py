"""OpenVINO IR: what it says of itself, and where it is no conversion of its student.

OpenVINO's converter takes ONNX's operators apart, so that IR has a student's constants in forms of
the converter's own. They are not read back. The student is written as ONNX anew, and that is
converted anew: IR that is this conversion, layer for layer and constant for constant, is the
program that the ONNX file is, which is held to the student as any other. IR is read as XML and
numbers here, without OpenVINO.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import CONVERSION_KEY
from sqakd_deploy.verification.constants import Difference, compare_constants
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.onnx_layers import OnnxFile

_TYPES = {"f32": TensorProto.FLOAT, "u8": TensorProto.UINT8}
_OF_OPENVINO = ("framework", "info")  # what it writes beside the metadata that it was given
_OBEYED = ("runtime_options", "intel_cpu_hints_config")  # of runtime information, by its plugins


@dataclass(frozen=True)
class _Layer:
    """A layer of IR.

    Attributes:
        name: that OpenVINO gave it, of which those that end in a number mean nothing.
        kind: its type.
        said: whatever it says, as text, but for where its constant lies.
        reads: each input's port, the position of the layer that it reads, and that one's port.
        element: type and shape of its constant, as stated.
        place: first byte of its constant and count of bytes; None of other layers.
    """

    name: str
    kind: str
    said: dict[str, str]
    reads: tuple[tuple[str, int, str], ...]
    element: tuple[str, str]
    place: tuple[int, int] | None


class IrFile(QdqFile):
    """IR as an ONNX file without layers: its input, its output and its metadata.

    Args:
        path: of the ``.xml``.

    Raises:
        ExportError: if it is no IR of one input and one output.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._net = ElementTree.parse(path).getroot()
            super().__init__(path, _ends(self._net))
        except (ElementTree.ParseError, OSError, ValueError, KeyError) as error:
            raise ExportError(f"{path} is no OpenVINO IR that is read here: {error}") from error

    @property
    def converter(self) -> str:
        """The versions of OpenVINO and of this package that wrote it."""
        openvino = self._net.find("rt_info/info[@name='OpenVINO Runtime']")
        version = "an unknown OpenVINO" if openvino is None else f"OpenVINO {openvino.get('value')}"
        return f"{version} and sqakd-deploy {self._fact(CONVERSION_KEY, 'version')}"

    @cached_property
    def layers(self) -> list[_Layer]:
        """Every layer, in the file's order."""
        positions = {e.get("id"): i for i, e in enumerate(self._net.findall("layers/layer"))}
        reads: dict[int, list[tuple[str, int, str]]] = {i: [] for i in positions.values()}
        for edge in self._net.findall("edges/edge"):
            source, reader = (positions[edge.get(end)] for end in ("from-layer", "to-layer"))
            reads[reader].append((edge.get("to-port", ""), source, edge.get("from-port", "")))
        elements = enumerate(self._net.findall("layers/layer"))
        return [_layer(element, tuple(sorted(reads[i]))) for i, element in elements]

    @cached_property
    def _weights(self) -> bytes:
        return self.path.with_suffix(".bin").read_bytes()

    def content(self, layer: _Layer) -> tuple[bytes, tuple[str, str]]:
        """A layer's constant as bytes, none of other layers, with its type and shape."""
        first, size = layer.place or (0, 0)
        return self._weights[first : first + size], layer.element

    @cached_property
    def others(self) -> str:
        """Whatever it says beside layers and metadata, and such metadata as OpenVINO obeys."""
        apart = [e for e in self._net if e.tag not in ("layers", "edges", "rt_info")]
        return "".join(map(_text, apart + [e for t in _OBEYED for e in self._net.iter(t)]))

    def layer_of(self, position: int, names: Collection[str]) -> str:
        """The layer that one at a position serves: the nearest behind it that has such a name."""
        waiting, seen = deque([position]), {position}
        while waiting:
            here = waiting.popleft()
            if self.layers[here].name in names:
                return self.layers[here].name
            readers = [i for i in self._behind[here] if i not in seen]
            waiting += readers
            seen.update(readers)
        return self.layers[position].name

    @cached_property
    def _behind(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self.layers]
        for i, layer in enumerate(self.layers):
            for _, source, _ in layer.reads:
                found[source].append(i)
        return found


def _layer(element: Element, reads: tuple[tuple[str, int, str], ...]) -> _Layer:
    said = {part.tag: _ports(part) or _text(part) for part in element if part.tag != "data"}
    said |= element.attrib | _data(element)
    place = (int(said.pop("offset")), int(said["size"])) if "offset" in said else None
    stated = said.get("element_type", ""), said.get("shape", "")
    name, kind, _ = (said.pop(key, "") for key in ("name", "type", "id"))
    return _Layer(name, kind, said, reads, stated, place)


def _data(element: Element) -> dict[str, str]:
    """What a layer is set to."""
    data = element.find("data")
    return {} if data is None else data.attrib


def _ports(element: Element) -> str:
    """Precision, shape and names of each port."""
    ports = [(p, ",".join(d.text or "" for d in p)) for p in element.findall("port")]
    return " ".join(f"{p.get('precision')}[{shape}]{p.get('names', '')}" for p, shape in ports)


def _text(element: Element) -> str:
    """An element without white space between its parts."""
    return re.sub(r">\s+<", "><", ElementTree.tostring(element, encoding="unicode")).strip()


def _ends(net: Element) -> ModelProto:
    """A model without nodes that has a net's input, output and metadata."""
    kinds = ("Parameter", "Result")
    ends = [e for kind in kinds for e in net.findall(f"layers/layer[@type='{kind}']")]
    if [e.get("type") for e in ends] != [*kinds]:
        raise ValueError(f"wanted one input and one output, got {len(ends)} of both together")
    source, result = ends
    data = source.attrib | _data(source)
    axes = [axis for axis in data["shape"].replace(" ", "").split(",") if axis]
    dims = [int(axis) if axis.isdecimal() else None for axis in axes]
    kind = _TYPES.get(data["element_type"], TensorProto.UNDEFINED)
    taken = helper.make_tensor_value_info(data["name"], kind, dims)
    name = result.get("output_names") or result.attrib["name"]
    given = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([], "IR", [taken], [given]))
    helper.set_model_props(model, dict(_metadata(net.find("rt_info"))))
    return model


def _metadata(info: Element | None, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Strings of the runtime information, by keys with dots, but for OpenVINO's own."""
    for element in () if info is None else info:
        if prefix or element.tag not in (*_OF_OPENVINO, *_OBEYED):
            if "value" in element.attrib:
                yield prefix + element.tag, element.attrib["value"]
            yield from _metadata(element, f"{prefix}{element.tag}.")


# -- against a conversion ------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """What a file is the conversion of.

    Attributes:
        file: to be asked for constants and tensors: the ONNX file that it is the conversion of, or
            the file itself.
        differences: where it is another graph.
        unknown: why its layers cannot be compared, nor constants if there are no differences.
    """

    file: OnnxFile
    differences: tuple[Difference, ...] = ()
    unknown: str | None = None


Converter: TypeAlias = Callable[[IrFile], Conversion]
"""Compares IR with a conversion of the student."""


def conversion_of(file: OnnxFile, converter: Converter | None) -> Conversion:
    """What a file is the conversion of; other files than IR are none."""
    if not isinstance(file, IrFile):
        return Conversion(file)
    if converter is None:
        why = "OpenVINO IR is held to a conversion of its run, and saved answers are no run"
        return Conversion(file, unknown=why)
    return converter(file)


def differences_between(file: IrFile, made: IrFile, names: Collection[str]) -> list[Difference]:
    """Where a file is another graph than one that was converted from the student.

    Args:
        file: in question.
        made: what it should be.
        names: of the student's layers, by which differences are called.
    """
    found: list[Difference] = []
    if file.others != made.others:
        found.append(_differing("runtime information", "options", "others", "the conversion's"))
    for i, (got, wanted) in enumerate(zip(file.layers, made.layers, strict=False)):
        layer = made.layer_of(i, names)
        if got.kind != wanted.kind:  # what follows has no counterpart
            return [*found, _differing(layer, "operator", got.kind, wanted.kind)]
        if got.reads != wanted.reads:
            what = f"inputs of {wanted.kind}"
            found.append(_differing(layer, what, _sources(file, got), _sources(made, wanted)))
        for key in sorted(got.said.keys() | wanted.said.keys()):
            if got.said.get(key) != wanted.said.get(key):
                sides = (side.said.get(key, "none") for side in (got, wanted))
                found.append(_differing(layer, f"{key} of {wanted.kind}", *sides))
        found += _differing_constants(layer, file.content(got), made.content(wanted))
    if len(file.layers) != len(made.layers):
        counts = (str(len(ir.layers)) for ir in (file, made))
        found.append(_differing("graph", "count of layers", *counts))
    return found


def _differing(layer: str, what: str, got: str, wanted: str) -> Difference:
    return Difference(layer, what, 1, 1, f"{got} in the file, {wanted} in the student")


def _sources(file: IrFile, layer: _Layer) -> str:
    return ", ".join(f"{file.layers[i].name}:{port}" for _, i, port in layer.reads)


def _differing_constants(
    name: str, got: tuple[bytes, tuple[str, str]], wanted: tuple[bytes, tuple[str, str]]
) -> Iterator[Difference]:
    """Difference of two constants, each its bytes, type and shape."""
    if got[0] == wanted[0]:
        return
    kind, shape = wanted[1]
    for read in (_numbers, _bytes):  # equal numbers may have other bits: 0 and -0
        sides = [{name: {f"constant {kind} ({shape})": read(*side)}} for side in (wanted, got)]
        found = compare_constants(sides[0], sides[1])
        if found:
            yield from found
            return


def _numbers(content: bytes, element: tuple[str, str]) -> NDArray[Any]:
    """What a constant holds; bytes, of a type that numpy does not have."""
    kind, shape = element
    known = re.fullmatch(r"([fiu])(8|16|32|64)", kind)
    if known is None:
        return _bytes(content, element)
    numbers = np.frombuffer(content, f"<{known[1]}{int(known[2]) // 8}")
    extents = [int(extent) for extent in shape.split(",") if extent]
    return numbers.reshape(extents) if numbers.size == np.prod(extents) else numbers


def _bytes(content: bytes, _: tuple[str, str]) -> NDArray[Any]:
    return np.frombuffer(content, np.uint8)

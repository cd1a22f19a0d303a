"""OpenVINO on the CPU: the exporter, and the runtime that proves its files.

The package itself is imported with the first runtime (:mod:`sqakd_exporters.openvino_session`):
listing the targets stays quick.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from sqakd_deploy import __version__
from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError, UnavailableError
from sqakd_deploy.exporting import (
    CONVERSION_KEY,
    Artifact,
    ExportOptions,
    PlacementRules,
    Session,
)
from sqakd_deploy.spec import QuantSpec
from sqakd_exporters.floats import repeat_without_shape
from sqakd_exporters.joining import with_codes_joined
from sqakd_exporters.openvino_bounds import clip_of_reals_or_codes
from sqakd_exporters.openvino_forms import for_openvino
from sqakd_exporters.packing import PACKED_BITS
from sqakd_exporters.qdq import EMITTERS, OPSETS, build_model
from sqakd_exporters.saving import save_checked
from sqakd_exporters.spreading import spread_normalize, spread_scale, spread_shift
from sqakd_exporters.unsigned import as_unsigned
from sqakd_exporters.writer import Emitters


def _session_module() -> Any:
    return importlib.import_module("sqakd_exporters.openvino_session")


def _require_openvino() -> None:
    if find_spec("openvino") is None:
        raise UnavailableError(
            "the package openvino is not installed; pip install 'sqakd-deploy[openvino]'"
        )


class OpenVinoExporter:
    """QDQ ONNX, or OpenVINO IR, in the forms that OpenVINO's CPU plugin runs in integers.

    A path that ends in ``.xml`` gives IR, with its weights in a ``.bin`` beside it, one in
    ``.onnx`` ONNX.

    Raises:
        UnavailableError: if the package openvino, which proves its files, is not installed.
    """

    name = "openvino"
    summary = "QDQ ONNX or IR for OpenVINO on CPUs: sums stay inside convolutions, unrounded"
    runtime = "openvino"
    placement = PlacementRules(fuse_sums=True, integer_products=False, widest_ends=7)
    packs = PACKED_BITS
    suffixes = (".onnx", ".xml")
    opsets = OPSETS

    def __init__(self) -> None:
        _require_openvino()

    def check(self, spec: QuantSpec) -> None:
        """Every spec that validates can run: 1 to 8 bits, any registered method."""

    def export(self, graph: g.IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        """Write the file, checked by onnx, whole or not at all.

        Raises:
            ExportError: if a node cannot be written, naming it; if the model does not pass onnx's
                checker; if the file cannot be written.
        """
        model = build_model(
            for_openvino(with_codes_joined(as_unsigned(graph))),
            options,
            emitters=_EMITTERS,
            packs=self.packs,
        )
        if path.suffix == ".xml":
            facts = {"opset": options.opset, "pack": options.pack, "version": __version__}
            model.metadata_props[CONVERSION_KEY] = json.dumps(facts)
            return self._export_ir(model, path)
        return Artifact(path, self.name, save_checked(model, path))

    def _export_ir(self, model: ir.Model, path: Path) -> Artifact:
        weights = path.with_suffix(".bin")
        size = _session_module().save_ir(ir.to_proto(model), path, weights)
        return Artifact(path, self.name, size, companions=(weights,))


class OpenVinoRuntime:
    """Opens ONNX and IR files with OpenVINO's CPU plugin.

    Raises:
        UnavailableError: if the package openvino is not installed.
    """

    name = "openvino"
    stages: Mapping[str, bool] = MappingProxyType(
        {"low precision off": False, "low precision on": True}
    )

    def __init__(self) -> None:
        _require_openvino()
        self._module = _session_module()

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        """Load a file.

        Args:
            path: the file.
            optimize: False turns the low-precision transformations off: the same numbers in float
                kernels. OpenVINO has no way to run a file as written.
            threads: inference threads; None takes OpenVINO's default.

        Raises:
            ExportError: if OpenVINO refuses the file.
        """
        if not path.is_file():  # OpenVINO's own message has ten lines
            raise ExportError(f"OpenVINO cannot load {path}: there is no such file")
        session: Session = self._module.OpenVinoSession(path, optimize=optimize, threads=threads)
        return session


_EMITTERS: Emitters = MappingProxyType(
    {
        **EMITTERS,
        g.Clip: clip_of_reals_or_codes,
        g.Normalize: spread_normalize,
        g.Repeat: repeat_without_shape,
        g.Scale: spread_scale,
        g.Shift: spread_shift,
    }
)

"""Hand-made graphs and students through QONNX's own executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from integer_graphs import CASES, Case, images
from networks import SHAPE, network
from networks import images as photos
from onnx import numpy_helper
from reference_executor import logits

from sqakd_deploy import graph as g
from sqakd_deploy.api import export_proven
from sqakd_deploy.errors import ExportError, UnavailableError
from sqakd_deploy.exporting import Exporter, ExportOptions, Runtime, StagedRuntime
from sqakd_deploy.plugins import get_exporter, get_runtime
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.report import coverage_lines
from sqakd_deploy.spec import QuantSpec, TensorSpec

pytest.importorskip("qonnx")

from sqakd_exporters import qonnx as plugin
from sqakd_exporters.qonnx import DOMAIN, QonnxExporter, QonnxRuntime, code_range

# As for the other runtimes: no sum of these graphs lies on a rounding boundary.
SAME_CODE = 1e-4


def write(graph: g.IntegerGraph, folder: Path) -> Path:
    return QonnxExporter().export(graph, folder / "m.onnx", ExportOptions()).path


@pytest.mark.parametrize("name", list(CASES))
def test_the_executor_agrees_with_integer_arithmetic(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]()
    graph = case.graph
    array = images(6, graph.values[graph.input].shape[1:], seed=5)  # type: ignore[arg-type]
    got = QonnxRuntime().open(write(graph, tmp_path)).run(array)
    reference = logits(graph, array)
    grid = graph.values[graph.output].grid
    step = float(grid.scale) if grid else float(np.ptp(reference)) / 255
    assert np.abs(got - reference).max() / step <= SAME_CODE


def test_all_layers_have_integers(tmp_path: Path) -> None:
    case: Case = CASES["joined"]()
    coverage = QonnxRuntime().open(write(case.graph, tmp_path)).coverage()
    assert dict(coverage.total) == dict(coverage.integer) == dict(case.integer)


def quantizers(path: Path) -> list[tuple[str, int]]:
    """(what is quantised, bits) of each quantizer in a file; 1 for BipolarQuant."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.domain == DOMAIN:
            assert node.op_type in ("IntQuant", "BipolarQuant")
            bits = int(constants[node.input[3]]) if node.op_type == "IntQuant" else 1
            found.append((node.input[0], bits))
    return found


@pytest.mark.parametrize(
    ("method", "bits", "stored"),
    [("lsq", 4, (4, 5)), ("lsq", 1, (1, 2)), ("ewgs", 2, (3, 3)), ("dorefa", 3, (4, 4))],
)
def test_students_are_proven_and_keep_their_bits(
    method: str, bits: int, stored: tuple[int, int], tmp_path: Path
) -> None:
    """BatchNorm may turn LSQ's −8 to 8, or make a channel 0; odd codes take a bit more."""
    side = TensorSpec(method=method, bits=bits)
    spec = QuantSpec(weights=side, activations=side, target="qonnx")
    student = quantize(network("residual").eval(), spec, example=SHAPE)
    calibrate(student, photos(32))
    student.eval()
    artifact, report = export_proven(student, tmp_path / "m.onnx", photos(24))
    assert report.failures == []
    assert [stage.name for stage in report.stages] == ["PyTorch student", "qonnx, executor"]
    assert report.coverage.fallbacks == ()
    said = [line for line in coverage_lines(report) if line.startswith(("packed", "weights"))]
    assert said == ["weights: reals on the grids of their bits, four bytes each in this format"]
    widths = {width for name, width in quantizers(artifact.path) if name.endswith("/weight")}
    assert widths <= {*stored, 8}
    assert widths & set(stored)
    assert bits in {width for name, width in quantizers(artifact.path)}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, (1, False)), (0, 15, (4, False)), (0, 255, (8, False)), (-8, 7, (4, True)),
     (-7, 8, (5, True)), (-3, 3, (3, True)), (-128, 127, (8, True)), (-1, 0, (1, True))],
)  # fmt: skip
def test_fewest_bits(low: int, high: int, expected: tuple[int, bool]) -> None:
    bits, signed = expected
    assert code_range(low, high) == expected
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert limits[0] <= low
    assert high <= limits[1]


def test_a_range_between_bits_is_refused(tmp_path: Path) -> None:
    graph = CASES["joined"]().graph
    value = graph.values["narrow_out"]
    assert value.grid is not None
    short = replace(value, grid=replace(value.grid, qmax=12))
    graph = replace(graph, values={**graph.values, value.name: short})
    with pytest.raises(ExportError, match="whole bits alone, wanted 0 to 15, got 0 to 12"):
        write(graph, tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_files_images_and_options(tmp_path: Path) -> None:
    graph = CASES["joined"]().graph
    with pytest.raises(ExportError, match="opset: this QONNX file has 13, got 17"):
        QonnxExporter().export(graph, tmp_path / "m.onnx", ExportOptions(opset=17))
    with pytest.raises(ExportError, match="input: QONNX files take prepared floats"):
        QonnxExporter().export(graph, tmp_path / "m.onnx", ExportOptions(input_type="uint8"))
    session = QonnxRuntime().open(write(graph, tmp_path))
    with pytest.raises(ExportError, match=r"wanted images \['N', "):
        session.run(np.zeros((2, 1, 3, 3), np.float32))
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x99cut")
    with pytest.raises(ExportError, match="is no ONNX file, or damaged"):
        QonnxRuntime().open(tmp_path / "cut.onnx")


def test_they_are_what_the_protocols_say() -> None:
    assert isinstance(get_exporter("qonnx"), Exporter)
    assert isinstance(get_runtime("qonnx"), Runtime)
    assert isinstance(get_runtime("qonnx"), StagedRuntime)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    for part in (QonnxExporter, QonnxRuntime):
        with pytest.raises(UnavailableError, match=r"pip install 'sqakd-deploy\[qonnx\]'"):
            part()

"""Hand-made graphs and students through QONNX's own executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from integer_graphs import CASES, Case, images
from networks import SHAPE, network
from networks import images as photos
from onnx import numpy_helper
from reference_executor import execute, logits

from sqakd_deploy import graph as g
from sqakd_deploy.abilities import ReadableSession
from sqakd_deploy.api import export, export_proven
from sqakd_deploy.errors import ExportError, UnavailableError
from sqakd_deploy.exporting import Exporter, ExportOptions, Runtime, StagedRuntime
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.plugins import get_exporter, get_runtime
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.comparing import compare_with_student
from sqakd_deploy.verification.constants import constants_of, offset
from sqakd_deploy.verification.isolated import SIMULATED
from sqakd_deploy.verification.isolating import isolate, isolator_of
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.settings import DILATION, FILLER, ORDER, PADDING
from sqakd_deploy.verification.student import record, reference_of
from sqakd_deploy.verification.tables import constants_lines, coverage_lines
from sqakd_deploy.verification.taps import read_codes
from sqakd_deploy.verification.verifying import verify_file

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


def test_an_excluded_layer_is_said_to_be_so(tmp_path: Path) -> None:
    student = quantize(network("residual"), QuantSpec(exclude=("conv1",)), example=SHAPE)
    calibrate(student, photos(32))
    path = export(student, tmp_path / "m.onnx", target="qonnx").path
    (fallback,) = QonnxRuntime().open(path).coverage().fallbacks
    assert fallback.node == "conv1"
    assert fallback.reason == "excluded from quantization ('conv1')"


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
    assert report.constants == ()
    assert report.isolated.keys() == {SIMULATED, "qonnx, executor"}
    layers = report.isolated["qonnx, executor"]
    assert (layers.unseen, layers.decides) == ((), True)
    assert report.saturation is None
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


def test_they_are_what_the_protocols_say(tmp_path: Path) -> None:
    assert isinstance(get_exporter("qonnx"), Exporter)
    assert isinstance(get_runtime("qonnx"), Runtime)
    assert isinstance(get_runtime("qonnx"), StagedRuntime)
    graph = CASES["joined"]().graph
    assert isinstance(QonnxRuntime().open(write(graph, tmp_path)), ReadableSession)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    for part in (QonnxExporter, QonnxRuntime):
        with pytest.raises(UnavailableError, match=r"pip install 'sqakd-deploy\[qonnx\]'"):
            part()


# -- what files hold, and what is planted in them --------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_constants_of_every_form_are_read(name: str, tmp_path: Path) -> None:
    graph = CASES[name]().graph
    assert compare_with_student(read_file(write(graph, tmp_path)), constants_of(graph)) == []


@pytest.mark.parametrize("name", list(CASES))
def test_codes_of_every_form_are_those_of_an_executor(name: str, tmp_path: Path) -> None:
    graph = CASES[name]().graph
    array = images(3, graph.values[graph.input].shape[1:], seed=5)  # type: ignore[arg-type]
    held = execute(graph, array)
    expected = {}
    for node in graph.nodes:
        grid = graph.values[node.output].grid
        if isinstance(node, g.Quantize) and grid is not None:
            counted = held[node.output].astype(np.int64) - offset(grid.dtype)
            # codes that are not negative are unsigned in QONNX, whatever the student's type
            expected[node.name] = counted - (128 if grid.dtype == "int8" and grid.qmin >= 0 else 0)
    file = read_file(write(graph, tmp_path))
    shapes = {name: codes.shape[1:] for name, codes in expected.items()}
    seen = read_codes(file, QonnxRuntime(), array, shapes)
    assert (seen.unseen, seen.programs) == ((), 1)
    assert list(seen.codes) == list(expected)
    for name, codes in expected.items():
        assert np.array_equal(seen.codes[name], codes), name


def student_of(name: str, bits: int = 4) -> torch.fx.GraphModule:
    side = TensorSpec(bits=bits)
    spec = QuantSpec(weights=side, activations=side, target="qonnx")
    student = quantize(network(name).eval(), spec, example=SHAPE)
    calibrate(student, photos(32))
    snap_biases(student)
    return student.eval()


@pytest.fixture(scope="module")
def residual() -> torch.fx.GraphModule:
    return student_of("residual")


@pytest.fixture(scope="module")
def mixed() -> torch.fx.GraphModule:
    return student_of("mixed")


Plant = Callable[[onnx.ModelProto], Any]


def planted(student: torch.fx.GraphModule, plant: Plant, folder: Path) -> Path:
    path = export(student, folder / "m.onnx").path
    proto = onnx.load(path)
    plant(proto)
    onnx.save(proto, path)
    return path


def node_of(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = [node for node in proto.graph.node if node.name == name]
    return found


def constant(name: str, change: Callable[[np.ndarray], Any]) -> Plant:
    def plant(proto: onnx.ModelProto) -> None:
        (tensor,) = [t for t in proto.graph.initializer if t.name == name]
        changed = np.asarray(change(numpy_helper.to_array(tensor).copy()), np.float32)
        tensor.CopyFrom(numpy_helper.from_array(changed, name))

    return plant


def attributes(name: str, **given: Any) -> Plant:
    def plant(proto: onnx.ModelProto) -> None:
        node = node_of(proto, name)
        kept = [a for a in node.attribute if a.name not in given]
        del node.attribute[:]
        node.attribute.extend([*kept, *(onnx.helper.make_attribute(*a) for a in given.items())])

    return plant


def behind(value: str, op_type: str, *more: np.ndarray, **given: Any) -> Plant:
    """An operator between a value and its readers."""

    def plant(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        graph.initializer.extend(
            numpy_helper.from_array(array, f"planted{i}") for i, array in enumerate(more)
        )
        for node in graph.node:
            node.input[:] = ["planted" if name == value else name for name in node.input]
        inputs = [value, *(f"planted{i}" for i in range(len(more)))]
        place = next((i for i, node in enumerate(graph.node, 1) if value in node.output), 0)
        graph.node.insert(place, onnx.helper.make_node(op_type, inputs, ["planted"], **given))

    return plant


def without(name: str) -> Plant:
    def plant(proto: onnx.ModelProto) -> None:
        gone = node_of(proto, name)
        for node in proto.graph.node:
            node.input[:] = [gone.input[0] if r == gone.output[0] else r for r in node.input]
        proto.graph.node.remove(gone)

    return plant


def exchanged(name: str) -> Plant:
    def plant(proto: onnx.ModelProto) -> None:
        node = node_of(proto, name)
        node.input[:] = node.input[::-1]

    return plant


def at(index: Any, value: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value(array[index])
        return array

    return change


CONSTANTS: dict[str, tuple[Plant, str]] = {
    "a weight": (
        constant("conv1/weight", at((2, 1, 0, 0), lambda w: w + 1)),
        "conv1: weight codes: 1 of 1152 differ, the first at (2, 1, 0, 0)",
    ),
    "a weight's scale": (
        constant("norm/weight/quant/quant/scale", at(3, lambda scale: scale * 1.001)),
        "norm: weight scale: 1 of 16 differ, the first at 3",
    ),
    "a weight's zero-point": (
        constant("conv1/weight/quant/quant/zero_point", lambda zero: zero + 1),
        "conv1: weight zero-point: 1 in the file, 0 in the student",
    ),
    "a weight's bits": (
        constant("conv2/weight/quant/quant/bits", lambda bits: bits + 1),
        "conv2: weight bits: 5 in the file, 4 in the student",
    ),
    "weights that nothing rounds": (
        without("conv2/weight/quant/IntQuant"),
        "conv2: weight codes: the file has none",
    ),
    "weights cut off": (
        attributes("conv2/weight/quant/IntQuant", rounding_mode="FLOOR"),
        "conv2: weight codes: the file has none",
    ),
    "a bias": (
        constant("conv2/bias", at(4, lambda bias: bias + 1e-3)),
        "conv2: bias: 1 of 16 differ, the first at 4",
    ),
    "a scale": (
        constant("quant_norm2/quant/scale", lambda scale: scale * 1.001),
        "quant_norm2: step: ",
    ),
    "a zero-point": (
        constant("quant_norm2/quant/zero_point", lambda zero: zero + 1),
        "quant_norm2: zero-point: ",
    ),
    "half a zero-point": (
        constant("quant_norm2/quant/zero_point", lambda zero: zero + 0.5),
        "quant_norm2: layer: its zero-point is ",
    ),
    "bits": (
        constant("quant_relu_1/quant/bits", lambda bits: bits + 1),
        "quant_relu_1: highest code: 31 in the file, 15 in the student",
    ),
    "too many bits": (
        constant("quant_relu_1/quant/bits", lambda bits: bits + 12),
        "quant_relu_1: layer: its zero-point is 0 and it has 16 bits",
    ),
    "a sign": (attributes("quant_relu_1", signed=1), "quant_relu_1: zero-point: "),
    "a narrow range": (
        attributes("quant_relu_1", narrow=1),
        "quant_relu_1: highest code: 14 in the file, 15 in the student",
    ),
    "another rounding": (
        attributes("quant_relu_1", rounding_mode="FLOOR"),
        "quant_relu_1: layer: it rounds otherwise than half to even",
    ),
    "a lost ReLU": (without("relu_2"), "relu_2: layer: no node of the file has its name"),
    "a scale for each channel": (
        constant("quant_relu_1/quant/scale", lambda scale: np.full((1, 16, 1, 1), scale)),
        "quant_relu_1: layer: it has 16 scales, one a channel",
    ),
}


@pytest.mark.parametrize("fault", CONSTANTS)
def test_a_wrong_constant_is_named(
    fault: str, residual: torch.fx.GraphModule, tmp_path: Path
) -> None:
    plant, text = CONSTANTS[fault]
    file = read_file(planted(residual, plant, tmp_path))
    found = [
        str(difference) for difference in compare_with_student(file, constants_of(lower(residual)))
    ]
    assert any(line.startswith(text) for line in found), found


@pytest.mark.parametrize(
    ("plant", "text"),
    [
        (constant("quant1_out/step", lambda step: step * 1.001), "step"),
        (constant("quant1_out/scale", lambda scale: scale * 1.001), "scale"),
        (without("quant1_out/Mul"), "scale"),
    ],
)
def test_steps_apart_from_scales_are_constants_of_their_own(
    plant: Plant, text: str, tmp_path: Path
) -> None:
    """EWGS: a Div before the quantizer and a Mul behind it, which may be lost."""
    graph = CASES["two_steps"]().graph
    path = write(graph, tmp_path)
    proto = onnx.load(path)
    plant(proto)
    onnx.save(proto, path)
    found = compare_with_student(read_file(path), constants_of(graph))
    assert [(wrong.layer, wrong.constant) for wrong in found] == [("quant1", text)]


STRUCTURE: dict[str, tuple[Plant, str]] = {
    "padding": (attributes("conv2", pads=[2, 1, 0, 1]), "quant_norm2"),
    "dilation": (attributes("conv2", pads=[2] * 4, dilations=[2, 2]), "quant_norm2"),
    "colours": (behind("input", "Gather", np.array([2, 1, 0]), axis=1), "quant_x"),
    "rows and columns": (behind("input", "Transpose", perm=[0, 1, 3, 2]), "quant_x"),
    "a factor": (behind("relu_1", "Mul", np.float32(1.02)), "quant_relu_1"),
    "a factor behind a quantizer": (
        behind("quant_relu_1", "Mul", np.float32(1.02)),
        "quant_norm2",
    ),
    "an offset": (behind("conv2", "Add", np.float32(0.02)), "quant_norm2"),
    "channels padded": (
        constant("pad/zero", lambda zero: zero + np.float32(0.1)),
        "quant_relu_2",
    ),
}

STRUCTURE_OF_MIXED: dict[str, tuple[Plant, str]] = {
    "exchanged inputs": (exchanged("cat_1"), "quant_cat_1"),
    "groups": (attributes("transpose", perm=[0, 1, 2, 3, 4]), "quant_cat_1"),
    "a pool's padding": (attributes("pool", pads=[0, 0, 2, 2]), "quant_left_1"),
}


def test_each_layer_of_a_true_file_is_the_students(
    residual: torch.fx.GraphModule, mixed: torch.fx.GraphModule, tmp_path: Path
) -> None:
    for student in (residual, mixed):
        file = read_file(export(student, tmp_path / "m.onnx").path)
        report = isolate(student, file, QonnxRuntime(), photos(2, seed=3).numpy())
        assert report.faults("executor") == []
        assert report.unseen == ()
        assert [tensor.name for tensor in report.tensors] == list(file.quantized)


@pytest.mark.parametrize("fault", [*STRUCTURE, *STRUCTURE_OF_MIXED])
def test_a_wrong_layer_is_named(
    fault: str, residual: torch.fx.GraphModule, mixed: torch.fx.GraphModule, tmp_path: Path
) -> None:
    """No constant that a layer holds says so; what operators are set to may."""
    student = residual if fault in STRUCTURE else mixed
    plant, name = (STRUCTURE | STRUCTURE_OF_MIXED)[fault]
    file = read_file(planted(student, plant, tmp_path))
    differences = compare_with_student(file, constants_of(lower(student)))
    assert {wrong.constant for wrong in differences} <= {PADDING, DILATION, ORDER, FILLER}
    report = isolate(student, file, QonnxRuntime(), photos(2, seed=3).numpy())
    assert report.decides
    assert report.faulty[0].name == name


def test_a_file_that_cannot_run_says_so(residual: torch.fx.GraphModule, tmp_path: Path) -> None:
    path = planted(residual, attributes("conv2", group=2), tmp_path)
    with pytest.raises(ExportError, match=r"qonnx's executor cannot run .*m\.onnx: .*conv2"):
        QonnxRuntime().open(path).run(photos(2).numpy())


def test_verify_compares_constants_layers_and_tensors(
    residual: torch.fx.GraphModule, tmp_path: Path
) -> None:
    path = export(residual, tmp_path / "m.onnx", options=ExportOptions(batch=3)).path
    report = verify_file(
        path,
        reference_of(residual, [photos(5)]),
        layer_samples=4,
        recorder=lambda array: record(residual, array),
        isolator=isolator_of(residual),
    )
    assert report.failures == []
    assert report.layers is not None
    assert (report.layers.missing, report.layers.unseen, report.layers.first) == ((), {}, None)
    assert constants_lines(report.parity)[0] == "constants: all those of the student"
    assert report.saturation.layers == ()
    assert "Pairs of products" not in str(report)  # a table without a row
    assert [stage.name for stage in report.parity.stages] == ["PyTorch student", "qonnx, executor"]
    assert "IntQuant" in report.parity.skipped["onnxruntime"]

"""The TensorRT profile: nothing here runs in TensorRT, everything is checked against its rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from integer_graphs import CASES, Symmetric, images
from networks import NETWORKS, SHAPE, network
from networks import images as photos
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from reference_executor import logits
from sqakd_exporters.onnxruntime import OnnxRuntime
from sqakd_exporters.tensorrt import TensorRtExporter
from sqakd_exporters.tensorrt_rules import RULES, check_file, check_model

from sqakd_deploy import graph as g
from sqakd_deploy.api import export, export_proven
from sqakd_deploy.bench.inputs import onnx_input
from sqakd_deploy.errors import ExportError, ParityError, SpecError
from sqakd_deploy.exporting import (
    Conformance,
    Exporter,
    ExportOptions,
    PlacementRules,
    ProfileExporter,
)
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.verification.student import reference_of
from sqakd_deploy.verification.tables import conformance_table, coverage_lines
from sqakd_deploy.verification.verifying import verify_file

# No sum of these graphs lies on a rounding boundary: all arithmetics give the same codes.
SAME_CODE = 1e-4

# Float sums in another order put one code of an image on its neighbour now and then (rule 20).
FEW_STEPS, RARELY = 8.0, 0.05

TRAINED = DistillConfig(epochs=1, batch_size=64, lr=3e-3, quantizer_lr=1e-3, bn_images=128)


def student_of(name: str = "residual", method: str = "lsq", bits: int = 4, **more: Any) -> Any:
    teacher = network(name)
    reestimate_batch_norm(teacher, photos(128))
    side = TensorSpec(method=method, bits=bits)
    spec = QuantSpec(weights=side, activations=side, target="tensorrt", **more)
    student = quantize(teacher, spec, example=SHAPE)
    distill(student, photos(128), teacher=teacher, config=TRAINED)
    return student


@pytest.mark.parametrize("opset", [20, 21, 25])
def test_pools_are_proven_at_every_opset(opset: int, tmp_path: Path) -> None:
    """From opset 21 on ONNX Runtime by itself fails at int8 quantizers that it moves."""
    student = student_of("mixed")
    options = ExportOptions(opset=opset)
    _, report = export_proven(student, tmp_path / "m.onnx", photos(64, seed=5), options=options)
    assert report.failures == []
    assert max(stage.mean_error for stage in report.stages) < RARELY


def broken(path: Path) -> dict[str, tuple[str, ...]]:
    return {check.rule: check.broken for check in check_file(path) if not check.held}


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_hand_made_graphs_give_their_numbers(name: str, tmp_path: Path) -> None:
    """Integers in numpy, and ONNX Runtime with its optimisations off and on."""
    graph = CASES[name](Symmetric).graph
    path = TensorRtExporter().export(graph, tmp_path / "m.onnx", ExportOptions()).path
    array = images(48, graph.values[graph.input].shape[1:], seed=5)  # type: ignore[arg-type]
    reference = logits(graph, array)
    grid = graph.values[graph.output].grid
    step = float(grid.scale) if grid else float(np.ptp(reference)) / 255
    # `floats` sums hundreds of float32 products before it is compared with float64
    allowed = 0.01 if name == "floats" else SAME_CODE
    for optimize in (False, True):
        got = OnnxRuntime().open(path, optimize=optimize, threads=1).run(array)
        assert np.abs(got - reference).max() / step <= allowed


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_gives_its_answers_and_holds_every_rule(
    method: str, bits: int, tmp_path: Path
) -> None:
    student = student_of(method=method, bits=bits)
    artifact, report = export_proven(student, tmp_path / "m.onnx", photos(128, seed=5))
    assert report.failures == []
    assert [stage.name for stage in report.stages[1:]] == [
        "onnxruntime, optimisations off",
        "onnxruntime, optimisations on",
    ]
    assert max(stage.max_error for stage in report.stages) <= FEW_STEPS
    assert max(stage.mean_error for stage in report.stages) < RARELY
    assert broken(artifact.path) == {}
    grids = [value.grid for value in lower(student).values.values() if value.grid]
    assert {(grid.zero_point, grid.dtype) for grid in grids} == {(0, "int8")}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_holds_every_rule(name: str, tmp_path: Path) -> None:
    """Shortcuts, concatenations, groups, ReLU6, MaxPool, shuffles, BatchNorm on its own."""
    artifact, report = export_proven(student_of(name), tmp_path / "m.onnx", photos(64, seed=5))
    assert report.failures == []
    assert broken(artifact.path) == {}
    kinds = {node.op_type for node in onnx.load(artifact.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm"} <= kinds


def test_one_input_of_a_sum_is_rounded_and_the_output_is_not() -> None:
    graph = lower(student_of())
    (add,) = [node for node in graph.nodes if isinstance(node, g.Add)]
    assert sorted(graph.values[name].grid is None for name in add.inputs) == [False, True]
    assert graph.values[graph.output].grid is None
    (linear,) = [node for node in graph.nodes if isinstance(node, g.Linear)]
    assert isinstance(linear.weight, np.ndarray)  # 5 classes are fewer than 16


class Dropped(torch.nn.Module):
    """Shortcuts around what training alone drops, as in EfficientNet, a layer scale in the second,
    as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.branch = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.drop = torchvision.ops.StochasticDepth(0.2, "row")
        self.scale = torch.nn.Parameter(torch.rand(16, 1, 1))
        self.head = torch.nn.Conv2d(16, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.drop(self.branch(x))
        return self.head(x + self.drop(self.scale * self.branch(x))).mean([2, 3])


def test_what_does_nothing_hides_no_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = quantize(Dropped().eval(), QuantSpec(target="tensorrt"), example=SHAPE)
    calibrate(student, photos(32))
    snap_biases(student)
    assert broken(export(student, tmp_path / "m.onnx").path) == {}


# -- what is said ----------------------------------------------------------------------------------


def test_every_place_says_that_it_was_not_run(tmp_path: Path) -> None:
    student = student_of()
    artifact, report = export_proven(student, tmp_path / "m.onnx", photos(32))
    said = f"not run in TensorRT; checked against {len(RULES)} documented rules, all held"
    assert coverage_lines(report)[0] == said
    assert not [line for line in coverage_lines(report) if line.startswith("in integers")]
    assert report.conformance is not None
    assert "not run" in str(conformance_table(report.conformance).title)
    facts = json.loads(json.dumps(report.to_dict()["conformance"]))
    assert facts["statement"] == said
    assert [check["rule"] for check in facts["checks"]] == [rule.number for rule in RULES]
    assert all(check["held"] for check in facts["checks"])
    assert "not run" in get_exporter("tensorrt").summary
    metadata = {entry.key: entry.value for entry in onnx.load(artifact.path).metadata_props}
    assert json.loads(metadata["sqakd.profile"]) == {"runtime": "TensorRT", "run": False}
    facts = onnx_input(artifact.path)
    assert facts is not None
    assert facts.profile is not None
    assert facts.profile.endswith("no figure here is TensorRT's")


def test_verify_checks_the_rules_of_any_file(tmp_path: Path) -> None:
    student = student_of()
    path = export(student, tmp_path / "m.onnx").path
    reference = reference_of(student, [photos(32)])
    found = verify_file(path, reference, others={})
    assert found.failures == []
    assert found.constants == ()
    assert found.to_dict()["parity"]["conformance"]["checks"][0]["held"]
    model = onnx.load(path)
    PLANTS["T5"][1](model)
    onnx.save(model, path)
    failures = verify_file(path, reference, others={}).parity.failures
    line = "rule T5 (weights are within −127 and 127) is broken: stem: weight code -128"
    assert line in failures  # its answers may differ, too


def test_a_wrong_bound_of_the_reals_is_a_wrong_bound_of_codes(tmp_path: Path) -> None:
    student = student_of()
    path = export(student, tmp_path / "m.onnx").path
    model = onnx.load(path)
    (clip,) = [n for n in model.graph.node if n.op_type == "Clip" and n.name.endswith("/bounds")]
    bound = constant(model, clip.input[2])
    change(model, clip.input[2], bound * np.float32(14 / 15))
    onnx.save(model, path)
    differences = verify_file(path, reference_of(student, [photos(8)]), others={}).constants
    assert [str(d) for d in differences or ()] == [
        "requant_relu_4: highest code: 142 in the file, 143 in the student"
    ]


# -- rules, each broken once -----------------------------------------------------------------------

Plant = Callable[[ModelProto], None]


def node(model: ModelProto, kind: str, index: int = 0) -> NodeProto:
    return [n for n in model.graph.node if n.op_type == kind][index]


def producer(model: ModelProto, name: str) -> NodeProto:
    return next(n for n in model.graph.node if name in n.output)


def constant(model: ModelProto, name: str) -> np.ndarray:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return numpy_helper.to_array(tensor)


def change(model: ModelProto, name: str, array: np.ndarray) -> None:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def add(model: ModelProto, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def put_before(model: ModelProto, reader: NodeProto, *nodes: NodeProto) -> None:
    place = list(model.graph.node).index(reader)
    for offset, made in enumerate(nodes):
        model.graph.node.insert(place + offset, made)


def a_zero_point(model: ModelProto) -> None:
    node(model, "DequantizeLinear").input[2] = add(model, "three", np.array(3, np.int8))


def uint8_codes(model: ModelProto) -> None:
    quantizer = node(model, "QuantizeLinear")
    add(model, "unsigned", np.array(0, np.uint8))
    quantizer.input[2] = "unsigned"
    for reader in model.graph.node:
        if quantizer.output[0] in reader.input:
            reader.input[2] = "unsigned"


def no_zero_point(model: ModelProto) -> None:
    quantizer = node(model, "QuantizeLinear")
    del quantizer.input[2]
    for reader in model.graph.node:
        if quantizer.output[0] in reader.input:
            del reader.input[2]


def an_integer_bias(model: ModelProto) -> None:
    conv = node(model, "Conv")
    count = constant(model, conv.input[2]).size
    inputs = [
        add(model, "bias_codes", np.ones(count, np.int32)),
        add(model, "bias_scale", np.ones(count, np.float32)),
    ]
    dequantizer = helper.make_node("DequantizeLinear", inputs, ["bias_real"], "bias_dq", axis=0)
    put_before(model, conv, dequantizer)
    conv.input[2] = "bias_real"


def scales_of_channels(model: ModelProto) -> None:
    node(model, "QuantizeLinear").input[1] = add(model, "three", np.ones(3, np.float32))


def scales_on_inputs(model: ModelProto) -> None:
    (axis,) = producer(model, node(model, "Conv").input[1]).attribute
    axis.i = 1


def a_negative_scale(model: ModelProto) -> None:
    name = producer(model, node(model, "Conv").input[1]).input[1]
    change(model, name, -constant(model, name))


def the_lowest_code(model: ModelProto) -> None:
    name = producer(model, node(model, "Conv").input[1]).input[0]
    codes = constant(model, name).copy()
    codes.flat[0] = -128
    change(model, name, codes)


def a_float_input(model: ModelProto) -> None:
    conv = node(model, "Conv", 1)
    quantizer = producer(model, producer(model, conv.input[0]).input[0])
    conv.input[0] = quantizer.input[0]


def a_clip_of_codes(model: ModelProto) -> None:
    dequantizer = producer(model, node(model, "Conv").input[0])
    inputs = [dequantizer.input[0], add(model, "one", np.array(1, np.int8))]
    put_before(model, dequantizer, helper.make_node("Clip", inputs, ["cut"], "cut"))
    dequantizer.input[0] = "cut"


def a_float_skip(model: ModelProto) -> None:
    total = node(model, "Add")
    (skip,) = [i for i, n in enumerate(total.input) if producer(model, n).op_type != "Conv"]
    moved = producer(model, total.input[skip])
    while moved.op_type != "DequantizeLinear":
        before = producer(model, moved.input[0])
        if before.op_type == "DequantizeLinear":
            moved.input[0] = producer(model, before.input[0]).input[0]
        moved = before


def pair(model: ModelProto, reader: NodeProto, position: int, scale: str) -> None:
    """Quantise what a node reads."""
    zero = add(model, "own_zero", np.array(0, np.int8))
    name = reader.input[position]
    quantizer = helper.make_node("QuantizeLinear", [name, scale, zero], ["own_codes"], "own")
    dequantizer = helper.make_node("DequantizeLinear", ["own_codes", scale, zero], ["own_real"])
    put_before(model, reader, quantizer, dequantizer)
    reader.input[position] = "own_real"


def a_rounded_convolution(model: ModelProto) -> None:
    total = node(model, "Add")
    (bare,) = [i for i, n in enumerate(total.input) if producer(model, n).op_type == "Conv"]
    pair(model, total, bare, add(model, "own_scale", np.array(0.1, np.float32)))


def a_quantised_pool(model: ModelProto) -> None:
    pool = node(model, "MaxPool")
    scale = producer(model, pool.input[0]).input[1]
    reader = next(n for n in model.graph.node if pool.output[0] in n.input)
    pair(model, reader, list(reader.input).index(pool.output[0]), scale)


def a_small_product(model: ModelProto) -> None:
    gemm = node(model, "Gemm")
    count = len(constant(model, gemm.input[1]))
    codes = np.ones(constant(model, gemm.input[1]).shape, np.int8)
    inputs = [add(model, "codes", codes), add(model, "scales", np.ones(count, np.float32))]
    inputs.append(add(model, "zeros", np.zeros(count, np.int8)))
    dequantizer = helper.make_node("DequantizeLinear", inputs, ["weights_real"], axis=0)
    put_before(model, gemm, dequantizer)
    gemm.input[1] = "weights_real"
    pair(model, gemm, 0, add(model, "own_scale", np.array(0.1, np.float32)))


def four_bit_weights(model: ModelProto) -> None:
    dequantizer = producer(model, node(model, "Conv", 1).input[1])
    model.opset_import[0].version = 21
    for index, name in ((0, "narrow"), (2, "narrow_zero")):
        shape = constant(model, dequantizer.input[index]).shape
        numbers = np.zeros(int(np.prod(shape)), np.int8)
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT4, shape, numbers))
        dequantizer.input[index] = name


def a_quantised_output(model: ModelProto) -> None:
    (output,) = model.graph.output
    producer(model, output.name).output[0] = "before"
    scale = add(model, "own_scale", np.array(0.1, np.float32))
    zero = add(model, "own_zero", np.array(0, np.int8))
    model.graph.node.extend(
        [
            helper.make_node("QuantizeLinear", ["before", scale, zero], ["own_codes"], "own"),
            helper.make_node("DequantizeLinear", ["own_codes", scale, zero], [output.name]),
        ]
    )


PLANTS: dict[str, tuple[str, Plant, str]] = {
    "T1": ("residual", a_zero_point, "zero-point 3"),
    "T2": ("residual", uint8_codes, "quant_x: uint8"),
    "T2 without": ("residual", no_zero_point, "quant_x: uint8"),
    "T3": ("residual", an_integer_bias, "stem: its bias is dequantised"),
    "T4": ("residual", scales_of_channels, "quant_x: 3 scales for an activation"),
    "T4 axis": ("residual", scales_on_inputs, "stem: 8 scales of its weights on axis 1, wanted 8 "),
    "T4 sign": ("residual", a_negative_scale, "a scale is not positive"),
    "T5": ("residual", the_lowest_code, "stem: weight code -128"),
    "T6": ("residual", a_float_input, "conv1: its input 'requant_relu_4/bounded' is not"),
    "T7": ("residual", a_clip_of_codes, "quant_x: its codes are read by Clip"),
    "T8": ("residual", a_float_skip, "add: its skip branch"),
    "T8 rounded": ("residual", a_rounded_convolution, "conv2 is quantised before the sum"),
    "T9": ("mixed", a_quantised_pool, "pool: own quantises it again"),
    "T10": ("residual", a_small_product, "classifier: weights 5×16"),
    "T11": ("residual", four_bit_weights, "conv1: 4-bit weights"),
    "T12": ("residual", a_quantised_output, "output 'logits' is quantised"),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        name: export(student_of(name), folder / f"{name}.onnx").path.read_bytes()
        for name in ("residual", "mixed")
    }


@pytest.mark.parametrize("plant", PLANTS)
def test_a_broken_rule_is_named_and_no_other(plant: str, exported: dict[str, bytes]) -> None:
    name, break_it, where = PLANTS[plant]
    model = onnx.load_from_string(exported[name])
    break_it(model)
    found = {check.rule: check.broken for check in check_model(model) if not check.held}
    assert set(found) == {plant.split()[0]}
    assert any(where in line for line in found[plant.split()[0]]), found
    conformance = Conformance("TensorRT", check_model(model))
    assert conformance.statement.endswith("1 broken")
    assert len(conformance.failures) == 1


def test_every_rule_has_a_violation() -> None:
    assert {plant.split()[0] for plant in PLANTS} == {rule.number for rule in RULES}


def test_a_file_that_breaks_a_rule_gets_no_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Placed as ONNX Runtime wants it, the convolution before the sum is rounded."""
    rules = PlacementRules(symmetric=True, quantize_output=False, smallest_matmul=16)
    monkeypatch.setattr(TensorRtExporter, "placement", rules)
    student = student_of()
    with pytest.raises(ExportError, match=r"m\.onnx: rule T8 .* conv2 is quantised before the sum"):
        export(student, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    _, report = export_proven(student, tmp_path / "m.onnx", photos(16))
    assert report.conformance is not None
    assert [check.rule for check in report.conformance.checks if not check.held] == ["T8"]
    with pytest.raises(ParityError, match="breaks rules of its target: rule T8"):
        report.raise_for_failures()
    assert list(tmp_path.iterdir()) == []


# -- refusals --------------------------------------------------------------------------------------


def test_it_is_what_the_protocols_say() -> None:
    assert isinstance(get_exporter("tensorrt"), Exporter)
    assert isinstance(get_exporter("tensorrt"), ProfileExporter)
    assert not isinstance(get_exporter("onnxruntime"), ProfileExporter)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"wanted placement 'target', got 'paper': .*rule T8"):
        quantize(
            network("residual"), QuantSpec(target="tensorrt", placement="paper"), example=SHAPE
        )
    graph = CASES["plain"]().graph
    with pytest.raises(
        ExportError, match=r"'image': wanted codes of int8 .* got 0 to 255 around 128"
    ):
        TensorRtExporter().export(graph, tmp_path / "m.onnx", ExportOptions())
    graph = CASES["plain"](Symmetric).graph
    with pytest.raises(ExportError, match=r"quantises no uint8 .*leave --input out"):
        TensorRtExporter().export(graph, tmp_path / "m.onnx", ExportOptions(input_type="uint8"))
    with pytest.raises(ExportError, match="opset: wanted 13 to 25, got 12"):
        TensorRtExporter().export(graph, tmp_path / "m.onnx", ExportOptions(opset=12))
    student = quantize(network("residual"), QuantSpec(target="tensorrt"), example=SHAPE)
    with pytest.raises(SpecError, match="does not restore packed weights"):
        export(student, tmp_path / "m.onnx", options=ExportOptions(pack=True))
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x99cut")
    with pytest.raises(ExportError, match="is no ONNX file, or damaged"):
        check_file(tmp_path / "cut.onnx")


# -- students of one target, files of another ----------------------------------------------------


def untrained(target: str) -> torch.fx.GraphModule:
    student = quantize(network("residual"), QuantSpec(target=target), example=SHAPE)
    calibrate(student, photos(64))
    snap_biases(student)
    return student


def test_another_target_is_refused_with_what_would_change(tmp_path: Path) -> None:
    path, student = tmp_path / "m.onnx", untrained("tensorrt")
    wanted = (
        r"trained for target 'tensorrt'\. Trained for 'onnxruntime', \d of \d+ quantised tensors "
        r"would learn a zero-point, and \d would have 255 steps instead of 127; 1 sums would take "
        r"a convolution's output rounded; the output would be quantised; 1 linear layers with "
        r"fewer than 16 inputs or outputs would be quantised\. Train with --target onnxruntime, or "
        r".* --anyway"
    )
    with pytest.raises(SpecError, match=wanted):
        export(student, path, target="onnxruntime")
    assert not path.exists()
    _, report = export_proven(student, path, photos(64), target="onnxruntime", anyway=True)
    assert report.failures == []
    assert report.conformance is None
    assert report.stages[1].name == "onnxruntime, optimisations off"
    found = verify_file(path, reference_of(student, [photos(16)]), others={})
    assert found.failures == []  # zero-points of uint8 are the int8 ones in another form
    assert found.parity.conformance is None


def test_what_does_not_fit_is_refused_even_if_told(tmp_path: Path) -> None:
    path, student = tmp_path / "m.onnx", untrained("onnxruntime")
    with pytest.raises(SpecError, match=r"would have zero-point 0.* take .* unrounded") as refused:
        export(student, path, target="tensorrt")
    said = "Train with --target tensorrt; --anyway would not help, since its rules refuse such"
    assert said in str(refused.value)
    with pytest.raises(ExportError, match="wanted codes of int8 around zero-point 0"):
        export(student, path, target="tensorrt", anyway=True)
    assert list(tmp_path.iterdir()) == []


def test_a_target_with_the_same_rules_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    artifact = export(untrained("onnxruntime"), tmp_path / "m.onnx", target="qonnx")
    assert artifact.exporter == "qonnx"
    facts = {entry.key: entry.value for entry in onnx.load(artifact.path).metadata_props}
    assert json.loads(facts["sqakd.target"]) == "qonnx"

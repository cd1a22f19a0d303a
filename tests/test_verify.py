"""Faults planted in exported files, and what is said of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from integer_graphs import CASES, UINT8, Builder
from integer_graphs import images as arrays
from networks import SHAPE, exact_here, images, network
from onnx import numpy_helper
from reference_executor import execute
from rich.console import Console
from sqakd_exporters.onnxruntime import OnnxRuntime, OnnxRuntimeExporter
from sqakd_exporters.qdq import build_model
from sqakd_exporters.saving import save_checked
from sqakd_exporters.unsigned import as_unsigned
from torch import nn

from sqakd_deploy import graph as g
from sqakd_deploy import parity
from sqakd_deploy.api import export
from sqakd_deploy.consoles import as_text
from sqakd_deploy.errors import DataError, ExportError, ParityError, SpecError
from sqakd_deploy.exporting import ExportOptions, Session, named_stages
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.plugins import get_exporter, get_runtime
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification import verifying
from sqakd_deploy.verification.bounds import other_bounds, other_terms
from sqakd_deploy.verification.comparing import compare_with_student
from sqakd_deploy.verification.constants import (
    Constants,
    Difference,
    compare_constants,
    constants_of,
)
from sqakd_deploy.verification.equivalents import in_one_form
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.isolated import SIMULATED, IsolatedReport
from sqakd_deploy.verification.isolating import _compare, _joined, isolate, isolator_of
from sqakd_deploy.verification.layer_tables import layers_lines, layers_parts, layers_table
from sqakd_deploy.verification.layers import (
    Begin,
    LayersReport,
    TensorReport,
    TensorStage,
    compare_layers,
)
from sqakd_deploy.verification.measures import range_step
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.reference import Reference, Tensor, load_reference, save_reference
from sqakd_deploy.verification.running import run_stages
from sqakd_deploy.verification.signs import never_negative
from sqakd_deploy.verification.stages import Tolerance, isolated_faults
from sqakd_deploy.verification.student import Rounding, record, reference_of, roundings
from sqakd_deploy.verification.tables import constants_lines, coverage_lines
from sqakd_deploy.verification.taps import NOISE, read_codes, tapped
from sqakd_deploy.verification.verifying import Verification, verify_file

Change = Callable[[np.ndarray], np.ndarray]
NEGATIVE = 5
"""A channel of ``norm1`` with a negative factor; channel 0 has none at all."""


@pytest.fixture(scope="module")
def student() -> torch.fx.GraphModule:
    torch.manual_seed(0)
    teacher = network("residual")
    teacher.norm1.weight.data[NEGATIVE] = -0.8
    reestimate_batch_norm(teacher, images(128))
    made = quantize(teacher, example=SHAPE)
    calibrate(made, images(128))
    snap_biases(made)
    return made


@pytest.fixture(scope="module")
def reference(student: torch.fx.GraphModule) -> Reference:
    return reference_of(student, [images(40), images(24, seed=2)])


@pytest.fixture
def model(student: torch.fx.GraphModule, tmp_path: Path) -> Path:
    """Unpacked: the constants that faults are planted in keep their names."""
    return export(student, tmp_path / "model.onnx", options=ExportOptions(pack=False)).path


def plant(path: Path, name: str, change: Change) -> None:
    proto = onnx.load(path)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(proto, path)


def at(index: Any, value: Change) -> Change:
    """Change some numbers of a constant, whatever its shape."""

    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value(array[index])
        return array

    return change


def verify(
    path: Path, reference: Reference, student: torch.fx.GraphModule | None = None, **options: Any
) -> Verification:
    if student is not None:
        options |= {"layer_samples": 32, "recorder": lambda i: record(student, i)}
    return verify_file(path, reference, **{"others": {}, **options})


def test_a_true_file_passes_whole(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    report = verify(model, reference, student)
    report.raise_for_failures()
    assert report.constants == ()
    assert report.layers is not None
    tensors = f"{len(report.layers.tensors)} quantised tensors, on the 32 images that differ most"
    assert f"\n{tensors}: all the student's, code for code\n" in str(report)  # no empty table
    graph = lower(student)
    quantizers = [node.name for node in graph.nodes if isinstance(node, g.Quantize)]
    assert sorted(tensor.name for tensor in report.layers.tensors) == sorted(quantizers)
    assert (report.layers.missing, report.layers.unseen, report.layers.first) == ((), {}, None)
    for tensor in report.layers.tensors:
        assert [(stage.max_error, stage.share, stage.snr) for stage in tensor.stages] == [
            (0.0, 0.0, None)
        ] * 2


@pytest.mark.parametrize(
    ("which", "count", "words"),
    [
        (range(12), 12, "the first 12 images"),
        (range(12), 5, "the first 5 images"),
        ([3, 1, 7], 3, "the 3 images that the reference has tensors of"),
        ([3, 1, 7], 2, "the first 2 images that the reference has tensors of"),
        ([3, 1, 7], 1, "one image"),
    ],
)
def test_which_images_a_saved_reference_has_tensors_of(
    which: list[int],
    count: int,
    words: str,
    student: torch.fx.GraphModule,
    reference: Reference,
    model: Path,
    tmp_path: Path,
) -> None:
    """They were chosen by another file's answers, or by nobody's."""
    indices = np.array(which)
    tensors = record(student, reference.images(indices))
    saved = replace(reference, tensors=tensors, tensor_images=indices)
    save_reference(saved, tmp_path / "r.npz")
    read = load_reference(tmp_path / "r.npz")
    assert f" quantised tensors, on {words}: all the" in str(
        verify(model, read, layer_samples=count)
    )
    plant(model, "conv2/bias", at(4, lambda code: code + np.int32(4000)))
    assert f" quantised tensors, on {words}; errors" in str(
        verify(model, read, layer_samples=count)
    )


def test_weights_in_another_file(
    student: torch.fx.GraphModule, reference: Reference, model: Path, tmp_path: Path
) -> None:
    apart = tmp_path / "apart.onnx"
    onnx.save(
        onnx.load(model),
        apart,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=200,
    )
    inside = verify(model, reference, student, isolator=isolator_of(student))
    report = verify(apart, reference, student, isolator=isolator_of(student))
    report.raise_for_failures()
    assert report.parity.coverage == inside.parity.coverage
    assert report.layers == inside.layers
    assert report.parity.size == sum(p.stat().st_size for p in (apart, tmp_path / "weights.bin"))


@pytest.mark.parametrize("width", [80, 100])
def test_tables_of_layers_keep_words_whole(
    width: int, student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    plant(model, "conv2/bias", at(4, lambda code: code + np.int32(4000)))
    report = verify(model, reference, student)
    paper = Console(file=StringIO(), width=width)
    assert report.layers is not None
    paper.print(layers_table(report.layers, width))
    text = paper.file.getvalue()  # type: ignore[attr-defined]
    assert ("SNR" in text) == (width == 100)
    for word in ("quant_classifier", "codes that", "(onnxruntime,", "optimisations"):
        assert word in text
    assert "are the student's, code for code" in str(report)


def differences(expected: Constants, path: Path) -> list[Difference]:
    file = QdqFile(path)
    return compare_constants(*in_one_form(file, expected, file.constants))


@pytest.mark.parametrize("pack", [False, None])
@pytest.mark.parametrize("name", ["residual", "mixed", "preactivation"])
def test_nothing_is_said_of_true_constants(name: str, pack: bool | None, tmp_path: Path) -> None:
    made = quantize(network(name), example=SHAPE)
    calibrate(made, images(64))
    path = export(made, tmp_path / "model.onnx", options=ExportOptions(pack=pack)).path
    expected = constants_of(lower(made))
    assert len(expected) >= 10
    assert differences(expected, path) == []


# -- six kinds of fault ---------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, Change, str, str]] = {
    "a weight code": (
        "classifier/weight",
        at((1, 2), lambda code: code + np.int8(1)),
        "classifier",
        "weight codes: 1 of 80 differ, the first at (1, 2)",
    ),
    "a weight scale": (
        "conv1/weight/scale",
        at(3, lambda scale: scale * np.float32(1.2)),
        "conv1",
        "weight scale: 1 of 16 differ, the first at 3",
    ),
    "a step": (
        "quant_norm2/q/scale",
        lambda scale: np.float32(1.001) * scale,
        "quant_norm2",
        "step: ",
    ),
    "a scale": (
        "quant_norm2/dq/scale",
        lambda scale: np.float32(1.001) * scale,
        "quant_norm2",
        "scale: ",
    ),
    "a bias": (
        "conv2/bias",
        at(4, lambda code: code + np.int32(9)),
        "conv2",
        "bias codes: 1 of 16 differ, the first at 4",
    ),
    "a bias zero-point": (
        "zeros_int32_5",
        at(4, lambda zero: zero + np.int32(1)),
        "classifier",
        "bias codes: 1 of 5 differ, the first at 4",
    ),
    "a zero-point": (
        "quant_norm2/q/zero_point",
        lambda zero: zero + np.uint8(1),
        "quant_norm2",
        "zero-point: ",
    ),
    "a Clip bound": (
        "clip_uint8_15",
        lambda bound: bound - np.uint8(1),
        "quant_relu_1",
        "highest code: 14 in the file, 15 in the student",
    ),
    "a folded sign": (
        "conv1/weight",
        at(NEGATIVE, lambda codes: -codes),
        "conv1",
        f"weight sign: all codes of channel {NEGATIVE} have the opposite sign",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(fault: str, reference: Reference, model: Path) -> None:
    constant, change, layer, text = FAULTS[fault]
    plant(model, constant, change)
    report = verify(model, reference)
    assert report.constants
    assert any(str(d).startswith(f"{layer}: {text}") for d in report.constants), report.constants
    if fault != "a Clip bound":  # one constant for all quantizers of a width
        assert len(report.constants) == 1
    with pytest.raises(ParityError, match=rf"the file is not its student: .*{layer}: "):
        report.raise_for_failures()


def test_every_reader_subtracts_the_zero_point(tmp_path: Path) -> None:
    """One that has none subtracts 0, whatever the others do."""
    made = quantize(network("preactivation"), example=SHAPE)
    calibrate(made, images(64))
    path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=False)).path
    proto = onnx.load(path)
    one, _ = [n for n in proto.graph.node if n.input[0] == "quant_stem" and n.output]
    assert one.op_type == "DequantizeLinear"
    one.input.pop()
    onnx.save(proto, path)
    (difference,) = compare_with_student(QdqFile(path), constants_of(lower(made)))
    assert str(difference) == (
        "quant_stem: zero-point that readers subtract: wanted shape (1,), the file has (2,)"
    )


def test_a_fault_without_effect_is_found(reference: Reference, model: Path) -> None:
    """Channel 0 is switched off by BatchNorm: its weights are 0 whatever their scale."""
    plant(model, "conv1/weight/scale", at(0, lambda scale: scale * np.float32(3)))
    report = verify(model, reference)
    assert all(stage.max_error < 1e-4 for stage in report.parity.stages)
    assert [(d.layer, d.constant) for d in report.constants or ()] == [("conv1", "weight scale")]
    assert report.failures
    assert report.to_dict()["passed"] is False


def test_a_fault_in_packed_weights_is_found(student: torch.fx.GraphModule, tmp_path: Path) -> None:
    path = export(student, tmp_path / "packed.onnx", options=ExportOptions(pack=True)).path
    proto = onnx.load(path)
    codes = lower(student)
    conv2 = next(n for n in codes.nodes if n.name == "conv2")
    size = conv2.weight.codes.size // 2  # type: ignore[attr-defined]
    (tensor,) = [t for t in proto.graph.initializer if list(t.dims) == [size] and t.data_type == 2]
    data = numpy_helper.to_array(tensor).copy()
    data[7] ^= 0x01
    tensor.CopyFrom(numpy_helper.from_array(data, tensor.name))
    onnx.save(proto, path)
    (difference,) = differences(constants_of(codes), path)
    assert (difference.layer, difference.constant) == ("conv2", "weight codes")
    assert difference.count == 1


def test_a_missing_layer_is_named(reference: Reference, model: Path) -> None:
    proto = onnx.load(model)
    next(node for node in proto.graph.node if node.name == "conv2").name = "other"
    onnx.save(proto, model)
    report = verify(model, reference)
    assert [str(d) for d in report.constants or ()] == [
        "conv2: layer: no node of the file has its name",
        "other: layer: the student has no Conv behind quant_relu_1/real1/DequantizeLinear",
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda scale, zero: (np.repeat(scale, 8), np.repeat(zero, 8)), "it has 8 scales"),
        (lambda scale, zero: (scale, zero.astype(np.uint16)), "its codes are uint16"),
    ],
)
def test_quantizers_of_other_tools_are_said_to_be_unsupported(
    change: Callable[..., Any], why: str, reference: Reference, model: Path
) -> None:
    """One scale for each channel, or 16 bits: there, under the student's name, and not compared."""
    proto = onnx.load(model)
    node = next(n for n in proto.graph.node if n.name == "quant_relu")
    held = {t.name: t for t in proto.graph.initializer}
    changed = change(*(numpy_helper.to_array(held[name]) for name in node.input[1:]))
    for name, array in zip(node.input[1:], changed, strict=True):
        held[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(proto, model)
    file = QdqFile(model)
    assert reference.constants is not None
    (difference,) = compare_with_student(file, reference.constants)
    assert str(difference).startswith(f"quant_relu: layer: {why}")
    report = LayersReport(1, (), {}, (), unsupported=file.unsupported)
    assert any(line.startswith(f"not compared: quant_relu: {why}") for line in layers_lines(report))


def test_pixels_that_are_codes_need_no_quantizer(reference: Reference, model: Path) -> None:
    """A file whose input are the first layer's codes: the scale is what is left to be wrong."""
    file = QdqFile(model)
    proto, codes = file.model, file.quantized["quant_x"].value
    node = next(n for n in proto.graph.node if n.name == "quant_x")
    proto.graph.node.remove(node)
    proto.graph.input[0].name = codes
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    onnx.helper.set_model_props(proto, {"sqakd.input": '{"normalisation": "folded"}'})
    onnx.save(proto, model)
    assert reference.constants is not None
    assert compare_with_student(QdqFile(model), reference.constants) == []
    plant(model, "quant_x/dq/scale", lambda scale: scale * np.float32(2))
    (difference,) = compare_with_student(QdqFile(model), reference.constants)
    assert (difference.layer, difference.constant) == ("quant_x", "scale")


def test_the_pixel_that_stands_for_zero_is_a_constant(tmp_path: Path) -> None:
    """Off by one it is a brightness that no answer may show."""
    plain = {"channels": 3, "input_size": [8, 8], "mean": [0.0] * 3, "std": [1.0] * 3}
    facts = {"sqakd.preprocessing": json.dumps(plain)}
    pixels = np.random.default_rng(0).integers(0, 256, (64, *SHAPE))
    pixels.flat[:2] = 0, 255
    sample = torch.from_numpy((pixels / np.float32(255)).astype(np.float32))
    made = quantize(network("residual"), example=SHAPE)
    calibrate(made, sample)
    snap_biases(made)
    options = ExportOptions(pack=False, input_type="uint8")
    artifact = export(made, tmp_path / "m.onnx", options=options, metadata=facts)
    assert "pixels are the codes" in artifact.input_form
    reference = reference_of(made, [sample[:8]], metadata=facts)
    assert verify(artifact.path, reference).failures == []
    true = artifact.path.read_bytes()
    restate(artifact.path, "sqakd.input", lambda facts: facts | {"normalisation": "nodes"})
    with pytest.raises(ParityError, match='normalisation: "nodes" in the file, "folded" in'):
        verify(artifact.path, reference)
    artifact.path.write_bytes(true)
    proto = onnx.load(artifact.path)
    zero = next(n for n in proto.graph.node if proto.graph.input[0].name in n.input).input[2]
    plant(artifact.path, zero, lambda zero: zero + np.uint8(1))
    difference, *_ = verify(artifact.path, reference).constants or ()
    assert (
        str(difference)
        == "quant_x: zero-point that readers subtract: 1 in the file, 0 in the student"
    )


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_one_number_for_a_tensor_may_have_a_shape(target: str, tmp_path: Path) -> None:
    """Other tools write scales and zero-points of shape (1,)."""
    made = quantize(network("residual"), exact_here(QuantSpec(target=target)), example=SHAPE)
    calibrate(made, images(64))
    snap_biases(made)
    path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=False)).path
    nodes = [n for n in onnx.load(path).graph.node if n.op_type.endswith("Linear")]
    for name in {name for node in nodes for name in node.input[1:]}:
        plant(path, name, lambda array: array.reshape(-1))
    report = verify(path, reference_of(made, [images(16)]), made)
    assert report.constants == ()
    assert report.layers is not None
    assert (report.layers.missing, report.layers.first) == ((), None)
    assert report.saturation.layers


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_may_stand_for_all_channels(shape: tuple[int, ...], tmp_path: Path) -> None:
    spec = QuantSpec(weights=TensorSpec(per_channel=False))
    made = quantize(network("residual"), spec, example=SHAPE)
    calibrate(made, images(64))
    path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=False)).path
    proto = onnx.load(path)
    for layer in ("weight", "bias"):
        real = f"classifier/{layer}/real"
        node = next(node for node in proto.graph.node if node.output[0] == real)
        scale = next(t for t in proto.graph.initializer if t.name == node.input[1])
        one = numpy_helper.to_array(scale)[:1].reshape(shape)
        scale.CopyFrom(numpy_helper.from_array(one, scale.name))
        zero = np.zeros(shape, np.int8 if layer == "weight" else np.int32)
        node.input[2] = f"{real}/zero"
        proto.graph.initializer.append(numpy_helper.from_array(zero, node.input[2]))
    onnx.save(proto, path)
    assert verify(path, reference_of(made, [images(16)])).failures == []


# -- what operators are set to --------------------------------------------------------------------


def with_attribute(path: Path, node: str, **attributes: Any) -> None:
    """Plant a fault: give a node other attributes."""
    proto = onnx.load(path)
    (found,) = [n for n in proto.graph.node if n.name == node]
    kept = [a for a in found.attribute if a.name not in attributes]
    del found.attribute[:]
    found.attribute.extend([*kept, *(onnx.helper.make_attribute(*a) for a in attributes.items())])
    onnx.save(proto, path)


class Settings(nn.Module):
    """Operators that are set to something beside their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(F.hardswish(F.gelu(F.pad(self.stem(x), (1, 0, 1, 0)))), 0.1)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.classifier(F.hardsigmoid(F.normalize(x, dim=1)).mean([2, 3]))


SETTINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "padding": (
        lambda path: with_attribute(path, "stem", pads=[2, 1, 0, 1]),
        "stem: padding: 2 of 4 differ, the first at 0: 2 in the file, 1 in the student",
    ),
    "dilation": (
        lambda path: with_attribute(path, "stem", pads=[2] * 4, dilations=[2, 2]),
        "stem: padding: 4 of 4 differ",
    ),
    "amounts": (
        lambda path: plant(path, "pad/amounts", lambda amounts: np.roll(amounts, 4)),
        "pad: amounts of padding: 4 of 8 differ",
    ),
    "axes": (
        lambda path: with_attribute(path, "permute", perm=[0, 3, 2, 1]),
        "permute: order of axes: 2 of 4 differ",
    ),
    "epsilon": (
        lambda path: with_attribute(path, "norm", epsilon=1e-5),
        "norm: epsilon: 9.99999975e-06 in the file, 9.99999997e-07 in the student",
    ),
    "least length": (
        lambda path: plant(path, "normalize/epsilon", lambda least: least * np.float32(10)),
        "normalize: epsilon: ",
    ),
    "slope": (lambda path: with_attribute(path, "leaky_relu", alpha=0.1001), "leaky_relu: slope: "),
    "gate": (
        lambda path: with_attribute(path, "hardswish/hard_sigmoid", alpha=0.1667),
        "hardswish/hard_sigmoid: slope: ",
    ),
    "GELU": (
        lambda path: with_attribute(path, "gelu", approximate="tanh"),
        "gelu: computed by tanh: 1 in the file, 0 in the student",
    ),
    "factor of products": (
        lambda path: with_attribute(path, "classifier", alpha=1.001),
        "classifier: factor of products: the student has none",
    ),
    "factor of the bias": (
        lambda path: with_attribute(path, "classifier", beta=0.0),
        "classifier: factor of the bias: the student has none",
    ),
    "offset": (
        lambda path: with_attribute(path, "hardsigmoid", beta=0.501),
        "hardsigmoid: value at 0: ",
    ),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_a_wrong_setting_is_found_without_the_student(target: str, tmp_path: Path) -> None:
    """Whether or not it shows in the answers that were saved."""
    torch.manual_seed(0)
    made = quantize(Settings(), exact_here(QuantSpec(target=target)), example=SHAPE)
    calibrate(made, images(32))
    expected = constants_of(lower(made))
    for pack in (None, False):
        path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=pack)).path
        assert compare_with_student(QdqFile(path), expected) == []
    right = path.read_bytes()
    for plant_it, text in SETTINGS.values():
        path.write_bytes(right)
        plant_it(path)
        (first, *_) = compare_with_student(QdqFile(path), expected)
        assert str(first).startswith(text)


def with_bound(path: Path, reader: str, op_type: str) -> None:
    """Plant a fault: bound what a node reads where no image of a test comes to."""
    bounds = {"Clip": (-1e3, 1e3), "Min": (1e3,), "Max": (-1e3,), "Mod": (1e3,)}.get(op_type)
    bounds = bounds or ((1 / 3,) if op_type in TERMS else ())
    proto = onnx.load(path)
    nodes = proto.graph.node
    (place,) = [i for i, node in enumerate(nodes) if node.name == reader]
    names = [f"bound{i}" for i in range(len(bounds))]
    source, attributes = nodes[place].input[0], {"fmod": 1} if op_type == "Mod" else {}
    given = [source, source, source] if op_type == "Where" else [source, *names]
    new = onnx.helper.make_node(op_type, given, ["bounded"], **attributes)
    nodes[place].input[0] = "bounded"
    nodes.insert(place, new)
    for name, bound in zip(names, bounds, strict=True):
        proto.graph.initializer.append(numpy_helper.from_array(np.array(bound, np.float32), name))
    onnx.save(proto, path)


@pytest.mark.parametrize("op_type", ["Clip", "Min", "Max", "Relu"])
def test_a_bound_that_the_student_has_not_is_found(op_type: str, tmp_path: Path) -> None:
    """Though answers and codes show nothing of it: no image may reach it."""
    made = quantize(Settings(), example=SHAPE)
    calibrate(made, images(32))
    expected = constants_of(lower(made))
    for pack in (None, False):
        path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=pack)).path
        right = path.read_bytes()
        for reader, place in {
            "quant_x": "of the input",
            "gelu": "behind ",
            "norm": "behind ",
            "quant_hardsigmoid": "behind hardsigmoid",
        }.items():
            path.write_bytes(right)
            with_bound(path, reader, op_type)
            found = [
                str(difference) for difference in compare_with_student(QdqFile(path), expected)
            ]
            if (reader, op_type) == ("quant_hardsigmoid", "Relu"):  # cuts nothing of what it reads
                assert found == []
                continue
            (said,) = found
            assert said.startswith(f"bounded: layer: the student has no {op_type} {place}")


TERMS = ("Add", "Sub", "Mul", "Div")
OTHERS = ("Ceil", "Celu", "Elu", "Floor", "LeakyRelu", "Mod", "Round", "Selu", "Shrink")
OTHERS += ("ThresholdedRelu", "Where")


@pytest.mark.parametrize("op_type", [*TERMS, *OTHERS])
def test_what_the_student_has_not_is_found(op_type: str, tmp_path: Path) -> None:
    """What moves values by less than rounding, or those of no image, shows in no code here."""
    made = quantize(Settings(), example=SHAPE)
    calibrate(made, images(32))
    path = export(made, tmp_path / "m.onnx").path
    with_bound(path, "norm", op_type)
    found = map(str, compare_with_student(QdqFile(path), constants_of(lower(made))))
    what = f"such {op_type}" if op_type in TERMS else op_type
    said = f"bounded: layer: the student has no {what} behind "
    assert any(difference.startswith(said) for difference in found)


# -- what only layers on the runtime's own codes show ---------------------------------------------


def test_scales_on_another_axis_are_no_scales_of_channels(
    reference: Reference, model: Path
) -> None:
    """As many inputs as outputs: the file loads, and the numbers are the student's."""
    with_attribute(model, "conv2/weight/real/DequantizeLinear", axis=1)
    assert [(d.layer, d.constant) for d in verify(model, reference).constants or ()] == [
        ("conv2", "weight scale on another axis than that of the output channels")
    ]


def with_difference(path: Path) -> None:
    """Plant a fault: make the student's one Add a Sub."""
    proto = onnx.load(path)
    (found,) = [n for n in proto.graph.node if n.name == "add"]
    found.op_type = "Sub"
    onnx.save(proto, path)


def planted_node(
    proto: onnx.ModelProto, op_type: str, source: str, output: str, more: Any, attributes: Any
) -> onnx.NodeProto:
    """An operator of constants and one value; they are added, it is not."""
    constants = [numpy_helper.from_array(a, f"planted{i}") for i, a in enumerate(more)]
    proto.graph.initializer.extend(constants)
    inputs = [source, *(constant.name for constant in constants)]
    return onnx.helper.make_node(op_type, inputs, [output], **attributes)


def with_input_behind(path: Path, op_type: str, *more: np.ndarray, **attributes: Any) -> None:
    """Plant a fault: an operator between the input and its readers."""
    proto = onnx.load(path)
    name = proto.graph.input[0].name
    for node in proto.graph.node:
        for i, read in enumerate(node.input):
            node.input[i] = "planted" if read == name else read
    proto.graph.node.insert(0, planted_node(proto, op_type, name, "planted", more, attributes))
    onnx.save(proto, path)


def with_output_behind(path: Path, op_type: str, *more: np.ndarray, **attributes: Any) -> None:
    """Plant a fault: an operator between the logits and the output."""
    proto = onnx.load(path)
    name = proto.graph.output[0].name
    for node in proto.graph.node:
        for i, written in enumerate(node.output):
            node.output[i] = "planted" if written == name else written
    proto.graph.node.append(planted_node(proto, op_type, "planted", name, more, attributes))
    onnx.save(proto, path)


STRUCTURE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a sum": (
        with_difference,
        "wrong on its own: quant_relu_2",
    ),
    "colours": (
        lambda path: with_input_behind(path, "Gather", np.array([2, 1, 0]), axis=1),
        "wrong on its own: quant_x",
    ),
    "rows and columns": (
        lambda path: with_input_behind(path, "Transpose", perm=[0, 1, 3, 2]),
        "wrong on its own: quant_x",
    ),
    "a factor": (
        lambda path: with_output_behind(path, "Mul", np.float32(1.01)),
        "wrong on their own: logits",
    ),
    "an offset": (
        lambda path: with_output_behind(path, "Add", np.array([0.02, 0, 0, 0, 0], np.float32)),
        "wrong on their own: logits",
    ),
}


@pytest.mark.parametrize("fault", STRUCTURE)
def test_a_fault_of_structure_fails_every_proof(
    fault: str, student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    """Within what logits may be off; no constant is wrong, but an operator may be new."""
    plant_it, text = STRUCTURE[fault]
    plant_it(model)
    loose = Tolerance(agreement=0, mean_error=1e3)
    proof = parity.verify(model, student, images(40), tolerance=loose)
    found = verify(model, reference, tolerance=loose, isolator=isolator_of(student))
    layers = verify(model, reference, student, tolerance=loose, isolator=isolator_of(student))
    for report in (proof, found, layers):
        new = map(str, report.constants or ())
        assert all("the student" in difference for difference in new)
        assert any(failure.startswith(text) for failure in report.failures)
    assert any(line.startswith(text) for line in constants_lines(proof))
    assert layers.layers is not None
    assert any(line.startswith(text) for line in layers_lines(layers.layers))


def test_a_student_whose_biases_were_never_rounded_is_proven(tmp_path: Path) -> None:
    """Calibrated alone, at 2 bits, where an accumulator's step is not small."""
    spec = QuantSpec(weights=TensorSpec(bits=2), activations=TensorSpec(bits=2))
    made = quantize(network("residual"), spec, example=SHAPE)
    calibrate(made, images(64))
    path = export(made, tmp_path / "m.onnx").path
    report = parity.verify(path, made, images(32), tolerance=Tolerance(0, mean_error=1e3))
    assert report.failures == []
    assert {name: stage.images for name, stage in report.isolated.items()} == {
        SIMULATED: 8,
        "onnxruntime, optimisations off": 8,
        "onnxruntime, optimisations on": 8,
    }


@pytest.mark.parametrize("bias", [1e2, 1e4])
def test_answers_far_from_zero_are_held_to_what_float32_resolves(
    bias: float, tmp_path: Path
) -> None:
    """As of a regression: 1/255 of what lies between them is less than a bit or two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(1024, 1))
    model[3].weight.data *= 1e-3
    model[3].bias.data += bias
    made = quantize(model, QuantSpec(output_bits=None), example=SHAPE)
    calibrate(made, images(64))
    path = export(made, tmp_path / "m.onnx").path
    report = parity.verify(path, made, images(32), tolerance=Tolerance(0))
    assert report.failures == []
    assert report.output_step_source == "what float32 resolves of the logits"


def test_layers_are_run_on_the_cpu(
    student: torch.fx.GraphModule, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the student is: elsewhere sums may be TF32's, and float64 may be missing."""
    moved: list[nn.Module] = []
    here, elsewhere = copy.deepcopy(student), copy.deepcopy(student).to("meta")
    monkeypatch.setattr(torch.fx.GraphModule, "cpu", lambda self: moved.append(self) or here)
    isolator = isolator_of(elsewhere)
    assert len(moved) == 1
    assert moved[0] is not elsewhere
    assert isolator(QdqFile(model), OnnxRuntime(), images(4).numpy(), True).faults("here") == []


def test_values_that_are_no_numbers_are_wrong_and_said_so() -> None:
    rule = Rounding("q", 1.0, 0, 15, 1.0)
    real, level = torch.tensor([[1.0, float("nan")]]), torch.ones((1, 2), dtype=torch.int16)
    found = _compare(rule, real, level)
    assert (found.differing, found.largest) == (1, 15)
    true = _compare(rule, torch.ones(1, 2), level)
    for joined in (_joined(true, found), _joined(found, true)):
        assert IsolatedReport(2, (joined,), ()).faulty == (joined,)


def test_logits_that_are_no_numbers_are_no_proof(
    student: torch.fx.GraphModule, model: Path
) -> None:
    report = isolate(student, QdqFile(model), OnnxRuntime(), images(4).numpy())
    assert report.faults("here") == []
    assert 0 <= report.logits < 1e-3
    (fault,) = replace(report, logits=float("nan")).faults("here")
    assert fault.startswith("wrong on their own: logits (here)")
    odd = replace(report.tensors[0], outside=float("nan"))
    assert replace(report, tensors=(odd,)).faulty == (odd,)


def test_a_student_keeps_its_mode_where_a_proof_breaks_off(
    student: torch.fx.GraphModule, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise ParityError("another shape")

    monkeypatch.setattr("sqakd_deploy.verification.isolating._compare", broken)
    student.train()
    with pytest.raises(ParityError, match=r"^another shape"):
        parity.verify(model, student, images(8))
    assert student.training
    student.eval()  # others read it


def test_an_operator_that_gives_another_shape_is_named(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    """Everything behind it has another shape, too: it is the first that is named."""
    with_attribute(model, "stem", strides=[2, 2])
    proto = onnx.load(model)
    (sliced,) = [n for n in proto.graph.node if n.name == "getitem"]
    held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    steps = np.ones_like(held[sliced.input[4]])
    proto.graph.initializer.append(numpy_helper.from_array(steps, "ones"))
    sliced.input[4] = "ones"
    onnx.save(proto, model)
    with_attribute(model, "conv1", strides=[1, 1])
    with pytest.raises(ParityError, match=r"quant_relu: wanted 512 codes an image, .* has another"):
        verify(model, reference, student)
    with pytest.raises(ParityError, match=r"quant_relu: wanted 512 codes an image, .* has another"):
        parity.verify(model, student, images(8))


def test_a_few_codes_are_rounding_whatever_their_share(
    student: torch.fx.GraphModule, model: Path
) -> None:
    """One image, whose five logits are all of a tensor: a step in one of them is a fifth."""
    sample = images(1).numpy()
    expected = record(student, sample)
    last = expected["quant_classifier"]
    codes = last.codes.copy()
    codes[0, 0] += 1
    expected["quant_classifier"] = replace(last, codes=codes)
    report = compare_layers(QdqFile(model), sample, expected, OnnxRuntime())
    assert [b.kind for b in report.begun[0].begins] == ["kernel"]
    codes[0, 0] += 1
    report = compare_layers(QdqFile(model), sample, expected, OnnxRuntime())
    assert [b.kind for b in report.begun[0].begins] == ["export"]


def test_saved_tensors_decide_where_there_is_no_student(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    loose = Tolerance(agreement=0, mean_error=1e3)
    good = verify(model, reference, student, tolerance=loose)
    assert good.failures == []
    with_difference(model)
    options: dict[str, Any] = {"tolerance": loose, "layer_samples": 32}
    bad = verify(model, good.reference, **options)
    operator, failure = bad.failures
    assert operator == "add: operator: Sub in the file, Add in the student"
    assert failure.startswith("quant_relu_2: differences beyond rounding begin here")


# -- what a file says of itself -------------------------------------------------------------------

PREPARED = {"channels": 3, "input_size": [8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
METADATA = {
    "sqakd.preprocessing": json.dumps(PREPARED),
    "sqakd.classes": json.dumps(["ant", "bee", "cat", "dog", "elk"]),
}


def test_metadata_of_the_users_own_are_kept_as_they_are(
    student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    own = {"author": "a person", "sqakd.classes": '["a", "b", "c", "d", "e"]'}
    saved = reference_of(student, [images(4)], metadata=own)
    save_reference(saved, tmp_path / "r.npz")
    read = load_reference(tmp_path / "r.npz").metadata
    assert read is not None
    assert {name: read[name] for name in own} == own


def restate(path: Path, key: str, change: Callable[[Any], Any]) -> None:
    """Plant a fault: let a file say otherwise."""
    proto = onnx.load(path)
    (entry,) = [e for e in proto.metadata_props if e.key == key]
    entry.value = json.dumps(change(json.loads(entry.value)))
    onnx.save(proto, path)


@pytest.mark.parametrize(
    ("key", "change", "text"),
    [
        (
            "sqakd.preprocessing",
            lambda facts: facts | {"mean": [0.5, 0.4, 0.4]},
            "mean: the first at 2: 0.4 in the file, 0.3 in the student",
        ),
        (
            "sqakd.preprocessing",
            lambda facts: facts | {"input_size": [8, 16]},
            "input_size: the first at 1: 16 in the file, 8 in the student",
        ),
        (
            "sqakd.classes",
            lambda names: [names[1], names[0], *names[2:]],
            'value: the first at 0: "bee" in the file, "ant" in the student',
        ),
        ("sqakd.classes", lambda names: names[:-1], "value: 4 in the file, 5 in the student"),
        (
            "sqakd.spec",
            lambda spec: spec | {"weights": spec["weights"] | {"bits": 3}},
            "weights.bits: 3 in the file, 4 in the student",
        ),
        ("sqakd.input", lambda facts: facts | {"name": "x"}, 'name: "x" in the file, "input" in'),
        ("sqakd.input", lambda facts: facts | {"layout": "NHWC"}, 'layout: "NHWC" in the file'),
        ("sqakd.input", lambda facts: facts | {"type": "uint8"}, 'type: "uint8" in the file'),
        ("sqakd.input", lambda facts: facts | {"batch": 4}, "batch: 4 in the file, null in"),
        ("sqakd.input", lambda facts: facts | {"range": [0, 1]}, "range: [0, 1] in the file, null"),
        (
            "sqakd.input",
            lambda facts: facts | {"normalisation": "nodes"},
            'normalisation: "nodes" in the file, "caller" in the student',
        ),
    ],
)
def test_what_a_file_says_of_itself_must_be_so(
    key: str,
    change: Callable[[Any], Any],
    text: str,
    student: torch.fx.GraphModule,
    tmp_path: Path,
) -> None:
    """Images that are prepared already show none of it."""
    path = export(student, tmp_path / "m.onnx", metadata=METADATA).path
    reference = reference_of(student, [images(16)], metadata=METADATA)
    assert verify(path, reference).failures == []
    restate(path, key, change)
    report = verify(path, reference)
    (failure,) = report.failures
    assert failure.startswith(f"metadata {key}: {text}")
    assert any(f"wrong: metadata {key}: {text}" in line for line in constants_lines(report.parity))
    assert report.to_dict()["parity"]["metadata"][0]["layer"] == f"metadata {key}"


@pytest.mark.parametrize("key", ["sqakd.preprocessing", "sqakd.classes", "sqakd.input"])
def test_metadata_that_nobody_can_read_are_a_difference(
    key: str, student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    path = export(student, tmp_path / "m.onnx", metadata=METADATA).path
    proto = onnx.load(path)
    (entry,) = [e for e in proto.metadata_props if e.key == key]
    entry.value = entry.value[:-1]
    onnx.save(proto, path)
    report = verify(path, reference_of(student, [images(16)], metadata=METADATA))
    assert report.failures == [f"metadata {key}: value: it is no JSON"]


@pytest.mark.parametrize(
    ("key", "stated", "text"),
    [
        ("sqakd.classes", ["ant", "bee"], "value: 2 names in the file, for 5 logits"),
        ("sqakd.preprocessing", PREPARED | {"input_size": [9, 9]}, "input_size: [3, 9, 9] in the"),
        ("sqakd.preprocessing", {"channels": 1}, "input_size: [1, 8, 8] in the file, for images"),
    ],
)
def test_what_a_file_cannot_mean_is_a_difference(
    key: str, stated: object, text: str, student: torch.fx.GraphModule, model: Path
) -> None:
    """Whether the student says anything of it or not."""
    proto = onnx.load(model)
    onnx.helper.set_model_props(proto, {key: json.dumps(stated)})
    onnx.save(proto, model)
    (failure,) = verify(model, reference_of(student, [images(4)])).failures
    assert failure.startswith(f"metadata {key}: {text}")


def test_what_a_file_does_not_say_is_no_difference(
    student: torch.fx.GraphModule, model: Path
) -> None:
    """Written from Python, without metadata; or by a version that knew fewer fields."""
    proto = onnx.load(model)
    del proto.metadata_props[:]
    known = {"sqakd.preprocessing": {"channels": 3}, "sqakd.spec": {"target": "onnxruntime"}}
    for facts in ({}, known):
        onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in facts.items()})
        onnx.save(proto, model)
        assert verify(model, reference_of(student, [images(4)], metadata=METADATA)).failures == []


def test_pixels_that_are_prepared_otherwise_are_not_fed(
    student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    """A mean that is off by one pixel value makes pixels that are off by one: no error but this."""
    options = ExportOptions(input_type="uint8")
    path = export(student, tmp_path / "m.onnx", options=options, metadata=METADATA).path
    mean, std = (np.array(PREPARED[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    pixels = np.random.default_rng(0).integers(1, 250, (8, *SHAPE))
    prepared = torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32))
    reference = reference_of(student, [prepared], metadata=METADATA)
    assert verify(path, reference).failures == []
    mean = next(n for n in onnx.load(path).graph.node if n.op_type == "Sub").input[1]
    true = path.read_bytes()
    plant(path, mean, at(1, lambda value: np.nextafter(value, np.float32(1))))
    (failure,) = verify(path, reference).failures
    assert "the student has no such Sub of the input" in failure
    path.write_bytes(true)
    restate(path, "sqakd.input", lambda facts: facts | {"normalisation": "folded"})
    said = r'metadata sqakd\.input: normalisation: "folded" in the file, "nodes" in the student'
    with pytest.raises(ParityError, match=said):
        verify(path, reference)
    restate(path, "sqakd.preprocessing", lambda facts: facts | {"mean": [0.5 + 1 / 255, 0.4, 0.3]})
    with pytest.raises(ParityError, match=r"metadata sqakd\.preprocessing: mean: the first at 0"):
        verify(path, reference)


@pytest.mark.parametrize(
    "wrong",
    [
        {0: np.uint8(1), 1: np.float32(1e-4)},
        {0: np.uint8(1)},
        {2: np.uint8(1)},
        {0: np.uint8(200), 1: np.float32(1e6), 2: np.uint8(200)},  # zero, but not to a kernel
    ],
)
def test_a_term_of_codes_that_is_not_zero_is_named(
    wrong: dict[int, np.generic], tmp_path: Path
) -> None:
    """Codes are rounded anew by way of a sum with zero; a small term moves none of them here."""
    teacher = network("residual")
    side = TensorSpec(bits=4)
    small = quantize(teacher, QuantSpec(weights=side, activations=side), example=SHAPE)
    calibrate(small, images(32))
    snap_biases(small)
    path = export(small, tmp_path / "m.onnx").path
    reference = reference_of(small, [images(16)])
    assert verify(path, reference).failures == []
    model = onnx.load(path)
    producers = {name: node for node in model.graph.node for name in node.output}
    terms = {n.input[1] for n in model.graph.node if n.op_type == "Add" and not n.name}
    (nothing,) = (name for name in terms if producers[name].op_type == "DequantizeLinear")
    for part, value in wrong.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"wrong{part}"))
        producers[nothing].input[part] = f"wrong{part}"
    onnx.save(model, path)
    failures = verify(path, reference).failures
    assert any("the student has no such Add" in failure for failure in failures)


@pytest.mark.parametrize("signed", [False, True])
def test_all_parts_of_codes_decide_what_cannot_be_negative(signed: bool, tmp_path: Path) -> None:
    """Then a ReLU behind them cuts nothing."""
    node = onnx.helper.make_node
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("QuantizeLinear", ["r", "s", "z"], ["left"], name="left"),
        node("QuantizeLinear", ["x" if signed else "r", "s", "z"], ["right"], name="right"),
        node("Concat", ["left", "right"], ["both"], axis=1),
        node("DequantizeLinear", ["both", "s", "z"], ["real"]),
        node("Relu", ["real"], ["y"], name="planted"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 3]) for n in "xy"]
    held = [
        numpy_helper.from_array(np.float32(0.1), "s"),
        numpy_helper.from_array(np.uint8(100), "z"),
    ]
    made = onnx.helper.make_graph(nodes, "parts", ends[:1], ends[1:], held)
    file = QdqFile(tmp_path / "none.onnx", onnx.helper.make_model(made))
    assert never_negative(file, "real") is not signed
    found = [str(difference) for difference in other_bounds(file, ["left", "right"])]
    assert any("the student has no Relu behind" in line for line in found) is signed


@pytest.mark.parametrize("shifted", [False, True])
def test_another_padding_is_named(shifted: bool, tmp_path: Path) -> None:
    """Also where codes are counted from another zero everywhere else."""
    builder = Builder()
    codes = builder.quantize("image", "x", (0, 15), 7)
    wide = builder.append(g.Pad, "pad", codes, before=(0, 0, 1, 1), after=(0, 0, 1, 1))
    conv = builder.conv("conv", wide, 8, padding=(0, 0, 0, 0))
    graph = builder.graph(builder.quantize("out", conv, UINT8, 128))
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    assert differences(constants_of(graph), path) == []
    model = onnx.load(path)
    by_name = {node.name: node for node in model.graph.node}
    clip = next(n for n in model.graph.node if n.op_type == "Clip")
    reader = next(n for n in model.graph.node if by_name["pad"].output[0] in n.input)
    places = [(by_name["image"], 2), (clip, 1), (clip, 2), (reader, 2)]
    for node, place in places if shifted else [(by_name["pad"], 2)]:
        (held,) = (t for t in model.graph.initializer if t.name == node.input[place])
        name = f"{node.output[0]}/{place}"
        shift = numpy_helper.to_array(held) + np.uint8(100)
        model.graph.initializer.append(numpy_helper.from_array(shift, name))
        node.input[place] = name
    onnx.save(model, path)
    (difference,) = differences(constants_of(graph), path)
    assert (difference.layer, difference.constant) == ("pad", "what is padded with")


# -- graphs that no student made ------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("pack", [False, None])
def test_constants_of_every_form_are_read(name: str, pack: bool | None, tmp_path: Path) -> None:
    graph = CASES[name]().graph
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions(pack=pack)).path
    file, expected = QdqFile(path), constants_of(graph)
    assert differences(expected, path) == []
    assert list(other_bounds(file, expected)) == []
    if name != "normalised":  # which is held to metadata, and a graph made by hand has none
        assert list(other_terms(file, expected)) == []


def test_a_float_bound_is_named(tmp_path: Path) -> None:
    graph = CASES["relu6_and_float_logits"]().graph
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    plant(path, "relu6/high", lambda bound: bound - np.float32(1))
    (difference,) = compare_constants(constants_of(graph), QdqFile(path).constants)
    assert str(difference) == "relu6: upper bound: 59 in the file, 60 in the student"


def tensors_of(graph: g.IntegerGraph, sample: np.ndarray) -> dict[str, Tensor]:
    """Codes from the tests' own executor, which shares nothing with student or runtime."""
    graph = as_unsigned(graph)
    held = execute(graph, sample)
    found = {}
    for node in graph.nodes:
        grid = graph.values[node.output].grid
        if isinstance(node, g.Quantize) and grid is not None:
            codes = np.asarray(held[node.output]).astype(np.uint8)
            found[node.name] = Tensor(codes, float(grid.scale), grid.zero_point)
    return found


@pytest.mark.parametrize("name", [n for n in CASES if n != "floats"])
def test_tensors_of_every_form_are_those_of_an_executor(name: str, tmp_path: Path) -> None:
    graph, sample = CASES[name]().graph, arrays(12, seed=5)
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    expected = tensors_of(graph, sample)
    report = compare_layers(QdqFile(path), sample, expected, OnnxRuntime())
    assert len(report.tensors) == len(expected)
    assert (report.unseen, report.missing) == ({}, ())
    assert all(s.max_error < 1e-6 for tensor in report.tensors for s in tensor.stages)


def test_int8_files_are_compared_in_the_same_terms(tmp_path: Path) -> None:
    """A target that keeps signed grids: codes and zero-points count from their type's lowest."""
    graph, sample = CASES["signed"]().graph, arrays(12, seed=5)
    path = tmp_path / "int8.onnx"
    save_checked(build_model(graph, ExportOptions()), path)
    file = QdqFile(path)
    assert {tensor.dtype for tensor in file.quantized.values()} == {"int8"}
    assert compare_constants(constants_of(graph), file.constants) == []
    assert compare_constants(constants_of(as_unsigned(graph)), file.constants) == []
    report = compare_layers(file, sample, tensors_of(graph, sample), OnnxRuntime())
    assert len(report.tensors) == 6
    assert all(s.max_error < 1e-6 for tensor in report.tensors for s in tensor.stages)


# -- where differences begin ----------------------------------------------------------------------


class Faulty:
    """ONNX Runtime whose optimiser plants a fault of its own, or all but it does."""

    name = "onnxruntime"

    def __init__(self, constant: str, change: Change, *, optimized: bool = True) -> None:
        self.constant, self.change, self.optimized = constant, change, optimized

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        if optimize == self.optimized:
            changed = path.with_name(f"changed-{path.name}")
            changed.write_bytes(path.read_bytes())
            plant(changed, self.constant, self.change)
            path = changed
        return OnnxRuntime().open(path, optimize=optimize, threads=threads)


def test_a_fault_of_the_export_begins_where_it_is(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    plant(model, "conv1/weight", at(NEGATIVE, lambda codes: -codes))
    report = verify(model, reference, student)
    assert report.layers is not None
    first = report.layers.first
    assert first is not None
    assert first.name == "quant_relu_1"
    (begin,) = first.begins
    assert (begin.kind, begin.stage) == ("export", "onnxruntime, optimisations off")
    assert begin.images == 32
    untouched = {t.name for t in report.layers.tensors if t.worst[0] == 0}
    assert {"quant_x", "quant_relu"} <= untouched
    errors = [t.worst for t in report.layers.tensors]
    assert errors == sorted(errors)
    assert report.layers.begun == (first,)  # what follows is handed down


# -- every layer on the runtime's own codes -------------------------------------------------------


@pytest.mark.parametrize("optimize", [False, True])
def test_each_layer_of_a_true_file_is_the_students(
    optimize: bool, student: torch.fx.GraphModule, model: Path
) -> None:
    sample = images(20, seed=3).numpy()
    report = isolate(student, QdqFile(model), OnnxRuntime(), sample, optimize)
    quantizers = [n for n in lower(student).nodes if isinstance(n, g.Quantize)]
    assert [tensor.name for tensor in report.tensors] == [node.name for node in quantizers]
    assert report.codes == sum(r.codes.size for r in record(student, sample).values())
    assert (report.images, report.unseen, report.faulty, report.differing) == (20, (), (), 0)


def test_a_fault_behind_another_is_found_where_it_is(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    plant(model, "conv1/weight", at(NEGATIVE, lambda codes: -codes))
    plant(model, "conv2/bias", at(4, lambda code: code + np.int32(4000)))
    run = isolator_of(student)
    report = verify(model, reference, student, isolator=run).layers
    assert report is not None
    assert [tensor.name for tensor in report.begun] == ["quant_relu_1"]  # hides the other
    for stage in ("optimisations off", "optimisations on"):
        isolated = report.isolated[f"onnxruntime, {stage}"]
        assert [tensor.name for tensor in isolated.faulty] == ["quant_relu_1", "quant_norm2"]
    lines = "\n".join(layers_lines(report))
    assert "wrong on its own: quant_norm2 (onnxruntime, optimisations on): " in lines


def test_small_moves_are_told_by_how_far_values_lie_from_the_border(
    student: torch.fx.GraphModule, model: Path
) -> None:
    sample = images(32).numpy()
    (conv,) = [n for n in lower(student).nodes if n.name == "conv2"]
    assert isinstance(conv, g.Conv)
    assert isinstance(conv.bias, g.IntBias)
    plant(model, "conv2/bias", at(4, lambda code: code + np.int32(3)))
    report = isolate(student, QdqFile(model), OnnxRuntime(), sample)
    (tensor,) = [t for t in report.tensors if t.differing]
    step = roundings(lower(student))["quant_norm2"].step
    assert (tensor.name, tensor.largest) == ("quant_norm2", 1)
    assert 0 < tensor.outside <= 3.001 * conv.bias.scale[4] / step


def test_a_tensor_that_cannot_be_read_is_isolated_from_none(
    student: torch.fx.GraphModule, model: Path
) -> None:
    report = isolate(student, QdqFile(model), Shy("quant_relu_1"), images(8).numpy())
    assert report.unseen == ("quant_relu_1",)
    assert report.faulty == ()
    assert report.programs > 1  # what could be read was read in halves
    assert not report.decides


def test_a_tensor_that_cannot_be_read_decides_nothing_beside_another(tmp_path: Path) -> None:
    """The other one is read from a single copy, but what lies behind is the student's own."""
    made = quantize(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), example=SHAPE)
    calibrate(made, images(64))
    snap_biases(made)
    file = QdqFile(export(made, tmp_path / "m.onnx").path)
    _, last = file.quantized.values()
    report = isolate(made, file, Shy(last.value), images(8).numpy())
    assert (report.programs, report.unread) == (1, (last.layer,))
    assert not report.decides
    moved = replace(report, logits=1.0)  # one code beside a border
    assert isolated_faults({"here": moved}) == []
    proof = verify(file.path, reference_of(made, [images(8)]), isolator=isolator_of(made)).parity
    assert "; " not in constants_lines(proof)[1]
    undecided = constants_lines(replace(proof, isolated={"here": moved}))
    assert undecided[1].startswith("layers: nothing decided on the runtime's own codes")
    partly = constants_lines(replace(proof, isolated={**proof.isolated, "here": moved}))[1]
    assert partly.startswith("layers: all 2 quantised tensors are the student's")
    assert partly.endswith("; elsewhere not all can be read at once (here)")
    tied = isolate(made, file, Shy("none"), images(8).numpy())
    tied = replace(tied, tensors=(replace(tied.tensors[0], differing=3), *tied.tensors[1:]))
    said = constants_lines(replace(proof, isolated={SIMULATED: tied, "here": tied}))[1]
    assert said.endswith(f"and fell the other way: 3 ({SIMULATED}), 3 (here)")
    none = constants_lines(replace(proof, isolated={SIMULATED: tied, "here": moved}))[1]
    assert none.startswith("layers: nothing decided on the runtime's own codes")
    layers = LayersReport(8, (), {}, (), {"here": moved})
    assert any(f"for {last.layer}, of the student" in line for line in layers_lines(layers))
    assert isolate(made, file, Shy("none"), images(8).numpy()).decides


def test_the_figures_of_a_tensor_are_what_they_say(student: torch.fx.GraphModule,
    reference: Reference, model: Path) -> None:  # fmt: skip
    """A scale that readers multiply by: codes are the same, what they stand for is not."""
    plant(model, "quant_norm2/dq/scale", lambda scale: scale * np.float32(1.25))
    report = verify(model, reference, student)
    assert report.layers is not None
    assert report.reference.tensors is not None
    (tensor,) = [t for t in report.layers.tensors if t.name == "quant_norm2"]
    own = report.reference.tensors["quant_norm2"]
    steps = own.codes.astype(float) - own.zero_point
    stage = tensor.stages[0]
    assert stage.max_error == pytest.approx(0.25 * np.abs(steps).max(), rel=1e-6)
    assert stage.mean_error == pytest.approx(0.25 * np.abs(steps).mean(), rel=1e-6)
    assert stage.share == pytest.approx(100 * np.mean(steps != 0))
    assert stage.snr == pytest.approx(20 * np.log10(4), abs=1e-4)
    assert tensor.begins[0].kind == "export"


@pytest.mark.parametrize(("amount", "kind"), [(3, "kernel"), (4000, "optimiser")])
def test_faults_of_the_optimiser_are_told_from_rounding(
    amount: int, kind: str, student: torch.fx.GraphModule, model: Path
) -> None:
    sample = images(32).numpy()
    change = at(4, lambda code: code + np.int32(amount))
    expected = record(student, sample)
    report = compare_layers(QdqFile(model), sample, expected, Faulty("conv2/bias", change))
    assert report.first is not None
    assert report.first.name == "quant_norm2"
    (begin,) = report.first.begins
    assert (begin.kind, begin.stage) == (kind, "onnxruntime, optimisations on")
    assert 0 < begin.images <= 32


@pytest.mark.parametrize(("amount", "kind"), [(3, "kernel"), (4000, "export")])
def test_nothing_begins_where_a_stage_has_the_students_codes(
    amount: int, kind: str, student: torch.fx.GraphModule, model: Path
) -> None:
    """Though it is not what the file unoptimised gives."""
    sample, change = images(32).numpy(), at(4, lambda code: code + np.int32(amount))
    runtime = Faulty("conv2/bias", change, optimized=False)
    report = compare_layers(QdqFile(model), sample, record(student, sample), runtime)
    assert report.first is not None
    assert [stage.max_error > 0 for stage in report.first.stages] == [True, False]
    (begin,) = report.first.begins
    assert (begin.kind, begin.stage) == (kind, "onnxruntime, optimisations off")
    assert {b.stage for t in report.tensors for b in t.begins} == {begin.stage}


def test_what_decides_comes_first_among_layers() -> None:
    """And what does not is marked."""

    def tensor(name: str, *errors: float, begins: tuple[Begin, ...] = ()) -> TensorReport:
        stages = zip(("off", "on", "other"), errors, strict=True)
        figures = tuple(TensorStage(stage, e, e / 10, e, None) for stage, e in stages)
        return TensorReport(name, 0, figures, begins)

    def begin(stage: str, images: int = 2) -> Begin:
        return Begin("kernel", stage, images, 1.0, 1.0, ())

    far = [tensor(f"far{i}", 0.0, 0.0, 9.0) for i in range(30)]
    near = tensor("near", 1.0, 0.0, 5.0, begins=(begin("off", 1), begin("other")))
    report = LayersReport(8, (*far, near), {}, ())
    parts = layers_parts(report, 100, ["other"])
    text = as_text(parts)
    assert text.count("*") == 21  # 19 far ones, one begin, what the star means
    first, second = [line for line in text.splitlines() if "near" in line or "far0" in line]
    assert "here, kernel (off, 1 image);" in first
    assert "1.00 │ 0.1000" in first
    assert "before it [other]* " in second
    assert parts[1:] == ["* of what decides nothing: other", "11 more: see --json"]
    assert layers_lines(report, ["other"]) == [
        "kernel: differences begin in 1 tensor, the first near (off, 1 image, up to 1.00 steps)",
        "decides nothing: kernel: differences begin in 1 tensor, the first near "
        "(other against off, 2 images, up to 1.00 steps)",
    ]
    assert "*" not in as_text(layers_parts(replace(report, tensors=(tensor("a", 1, 0, 0),)), 100))


def test_rounding_in_the_file_is_no_fault_of_the_export(
    student: torch.fx.GraphModule, model: Path
) -> None:
    """The same small move is the export's once the constants are known to be wrong."""
    sample = images(32).numpy()
    plant(model, "conv2/bias", at(4, lambda code: code + np.int32(3)))
    file, expected = QdqFile(model), record(student, sample)
    for wrong, kind in (((), "kernel"), (("conv2",), "export")):
        report = compare_layers(file, sample, expected, OnnxRuntime(), wrong=wrong)
        assert report.first is not None
        assert [b.kind for b in report.first.begins] == [kind]


def test_the_images_that_differ_most_are_looked_into(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    odd = [b.copy() for b in reference.batches]
    logits = reference.logits.copy()
    logits[50] += 100 * reference.step[0]  # type: ignore[index]
    changed = replace(reference, batches=tuple(odd), logits=logits)
    options: dict[str, Any] = {"layer_samples": 3, "recorder": lambda i: record(student, i)}
    report = verify_file(model, changed, others={}, **options)
    assert report.reference.tensor_images is not None
    assert report.reference.tensor_images[0] == 50
    assert report.layers is not None
    assert report.layers.images == 3


# -- reading on the way ---------------------------------------------------------------------------


class Shy:
    """Answers otherwise, by so much, as soon as one tensor is looked at."""

    name = "shy"

    def __init__(self, value: str, by: float = 0.25) -> None:
        self.value, self.by = value, by

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        nodes = onnx.load(path).graph.node
        watched = any(n.op_type == "Cast" and self.value in n.input for n in nodes)
        session: Any = OnnxRuntime().open(path, optimize=optimize)
        if watched:
            run = session.run
            session.run = lambda images: run(images) + np.float32(self.by)
        return session  # type: ignore[no-any-return]


def test_a_tensor_that_cannot_be_read_is_said_to_be_unseen(model: Path) -> None:
    file = QdqFile(model)
    sample = images(10).numpy()
    shapes = {"quant_x": (3, 8, 8), "quant_relu": (8, 8, 8), "quant_norm2": (16, 4, 4)}
    every = read_codes(file, OnnxRuntime(), sample, shapes)
    assert every.unseen == ()
    seen = read_codes(file, Shy(file.quantized["quant_relu"].value), sample, shapes)
    assert seen.unseen == ("quant_relu",)
    assert set(seen.codes) == {"quant_x", "quant_norm2"}
    for name, codes in seen.codes.items():
        np.testing.assert_array_equal(codes, every.codes[name])


@pytest.mark.parametrize(("steps", "trusted"), [(0.5 * NOISE, True), (2 * NOISE, False)])
def test_a_copy_is_trusted_within_noise(
    steps: float, trusted: bool, student: torch.fx.GraphModule, model: Path
) -> None:
    file, sample = QdqFile(model), images(8).numpy()
    step, _ = range_step(OnnxRuntime().open(model).run(sample))
    shy = Shy(file.quantized["quant_relu"].value, steps * step)
    report = isolate(student, file, shy, sample)
    assert (report.unread, report.decides) == (() if trusted else ("quant_relu",), trusted)
    assert report.moved == pytest.approx(steps if trusted else 0.0, rel=0.1)
    said = f"; read from copies whose answers differ by up to {report.moved:.1e} steps"
    lines = layers_lines(LayersReport(8, (), {}, (), {"here": report}))
    assert any(said in line for line in lines) == trusted


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_answers_that_are_no_numbers_are_those_of_a_copy_alone_if_it_gives_them_too(
    odd: float, model: Path
) -> None:
    file, sample = QdqFile(model), images(4).numpy()

    class Odd:
        name = "odd"

        def __init__(self, of_file: float, of_copy: float) -> None:
            self.of_file, self.of_copy = of_file, of_copy

        def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
            session: Any = OnnxRuntime().open(path, optimize=optimize)
            run, first = session.run, self.of_file if path == model else self.of_copy

            def changed(images: np.ndarray) -> np.ndarray:
                logits: np.ndarray = run(images)
                logits[:, 0] = first
                return logits

            session.run = changed
            return session  # type: ignore[no-any-return]

    for pair, unseen in (((odd, odd), ()), ((odd, 0.0), ("quant_x",)), ((0.0, odd), ("quant_x",))):
        seen = read_codes(file, Odd(*pair), sample, {"quant_x": (3, 8, 8)})
        assert seen.unseen == unseen


def test_a_difference_behind_an_unseen_tensor_may_have_begun_there(
    student: torch.fx.GraphModule, model: Path
) -> None:
    """The runtime's own fault is in conv1; the tensor that conv1 writes cannot be read."""
    file, sample = QdqFile(model), images(32).numpy()

    class Both(Shy):
        def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
            if optimize:
                plant(path, "conv1/bias", at(4, lambda code: code + np.int32(4000)))
            return super().open(path, optimize=optimize)

    shy = Both(file.quantized["quant_relu_1"].value)
    copy = model.with_name("copy.onnx")
    copy.write_bytes(model.read_bytes())
    report = compare_layers(QdqFile(copy), sample, record(student, sample), shy)
    assert set(report.unseen.values()) == {("quant_relu_1",)}
    assert report.first is not None
    assert report.first.name == "quant_norm2"
    (begin,) = report.first.begins
    assert (begin.kind, begin.or_in) == ("optimiser", ("quant_relu_1",))


def test_reading_takes_no_layer_from_the_integer_kernels(
    student: torch.fx.GraphModule, model: Path, tmp_path: Path
) -> None:
    file = QdqFile(model)
    path = tmp_path / "tapped.onnx"
    sizes = {n: t.codes[0].size for n, t in record(student, images(1).numpy()).items()}
    wanted = [file.quantized[name] for name in sizes]
    onnx.save(tapped(file.model, wanted, sizes.values()), path)
    before, after = (OnnxRuntime().open(p).coverage() for p in (model, path))
    assert after.integer == before.integer
    assert before.integer["Conv"] == 4
    assert [f.node for f in after.fallbacks if f.op_type != "Concat"] == []


def test_tokens_on_the_first_axis_are_read_by_image(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 7, opset_import: ["" : 13]>
        tokens (float[N, 4, 3] x) => (float[N, 12] y)
        <int64[2] rows = {-1, 3}, int64[2] images = {-1, 12},
         float scale = {0.5}, uint8 zero = {7}> {
            flat = Reshape (x, rows)
            codes = QuantizeLinear (flat, scale, zero)
            real = DequantizeLinear (codes, scale, zero)
            y = Reshape (real, images)
        }""")
    model.graph.node[1].name = "quant"
    onnx.save(model, tmp_path / "tokens.onnx")
    sample = arrays(5, (4, 3))
    seen = read_codes(QdqFile(tmp_path / "tokens.onnx"), OnnxRuntime(), sample, {"quant": (4, 3)})
    np.testing.assert_array_equal(seen.codes["quant"], np.rint(sample / 0.5) + 7)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("pack", [False, None])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_tensors_of_transposed_convolutions_are_the_students(
    kernel: int, stride: int, padding: int, pack: bool | None, target: str, tmp_path: Path
) -> None:
    """They are rounded in blocks of pixels, which the second of these cuts at the edge."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, kernel, stride, padding), nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    made = quantize(model, exact_here(QuantSpec(target=target)), example=SHAPE)
    calibrate(made, images(64))
    snap_biases(made)
    path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=pack)).path
    sample, runtime = images(12, seed=5).numpy(), get_runtime(get_exporter(target).runtime)
    compared = compare_layers(QdqFile(path), sample, record(made, sample), runtime)
    assert (compared.missing, compared.first) == ((), None)
    assert not any("quant__3" in unseen for unseen in compared.unseen.values())
    isolated = isolate(made, QdqFile(path), runtime, sample)
    assert isolated.unseen == ()
    assert isolated.differing <= 2  # of thousands: values on the border of two codes
    assert all(tensor.outside < 1e-3 for tensor in isolated.tensors)


# -- other runtimes -------------------------------------------------------------------------------


def test_codes_of_several_programs_are_shown_and_decide_nothing(
    student: torch.fx.GraphModule, reference: Reference, model: Path
) -> None:
    """Two copies of a file may round a code at a border each its own way."""
    plant(model, "conv2/bias", at(4, lambda code: code + np.int32(4000)))
    report = verify(model, reference, student, isolator=isolator_of(student))
    assert any("wrong on its own" in line for line in report.failures)
    assert report.layers is not None
    of_several = {s: replace(r, programs=2) for s, r in report.layers.isolated.items()}
    shown = replace(report, layers=replace(report.layers, isolated=of_several))
    assert not any("wrong on its own" in line for line in shown.failures)
    lines = layers_lines(shown.layers)
    assert any("wrong on its own" in line for line in lines)
    assert any("that decides nothing: the codes" in line for line in lines)


class Refuses:
    name = "refuses"

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        raise RuntimeError("no licence\nfound")


def test_every_runtime_that_opens_the_file_takes_part(
    student: torch.fx.GraphModule,
    reference: Reference,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Faulty("conv2/bias", at(4, lambda code: code + np.int32(4000)))
    both = {"other": other, "refuses": Refuses()}
    with pytest.raises(ExportError, match="refuses cannot run the file: no licence found"):
        verify(model, reference, student, others=both)
    monkeypatch.setattr(verifying, "runtimes_for", lambda path: both)
    report = verify(model, reference, student, others=None)
    assert [stage.name for stage in report.parity.stages][3:] == ["other"]
    assert report.parity.stages[3].max_error > 0
    assert report.parity.skipped == {"refuses": "no licence found"}
    assert report.layers is not None
    assert report.layers.first is not None
    assert [(b.kind, b.stage) for b in report.layers.first.begins] == [("optimiser", "other")]


class Talks:
    """A runtime whose session says something else than this package's reports need."""

    name = "talks"

    def __init__(self, classes: int = 5, covered: object = None) -> None:
        self.classes, self.covered = classes, covered

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        return cast("Session", self)

    def run(self, images: np.ndarray) -> np.ndarray:
        return np.zeros((len(images), self.classes), np.float32)

    def coverage(self) -> object:
        return self.covered


def test_answers_of_another_shape_decide_where_the_runtime_does(
    reference: Reference, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bystander's are its own fault; one that proves the file, or is named, must not have any."""
    odd = {"talks": Talks(classes=4)}
    monkeypatch.setattr(verifying, "runtimes_for", lambda path: odd)
    shown = verify(model, reference, others=None)
    assert shown.failures == []
    assert "got (64, 4)" in shown.parity.skipped["talks"]
    with pytest.raises(ExportError, match=r"talks cannot run the file: .*got \(64, 4\)"):
        verify(model, reference, others=odd)


def test_coverage_that_is_none_is_an_error_before_there_is_a_report(
    reference: Reference, model: Path
) -> None:
    batches, talks = list(reference.batches), Talks(covered={"Conv": 1})
    with pytest.raises(ExportError, match="talks: wanted a Coverage of its session, got dict"):
        run_stages(model, batches, reference.expected(), talks)


def test_another_models_file_is_refused(reference: Reference, tmp_path: Path) -> None:
    graph = CASES["relu6_and_float_logits"]().graph
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    fewer = replace(reference, logits=reference.logits[:, :4])
    with pytest.raises(ParityError, match=r"wanted logits \(64, 4\).*got \(64, 5\): .* another"):
        verify(path, fewer)


def test_answers_alone_are_compared_where_constants_have_another_form(
    reference: Reference, tmp_path: Path
) -> None:
    """A model in float."""
    plain = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 13]>
        plain (float[N, 3, 8, 8] input) => (float[N, 5] logits)
        <float[5] few = {0, 1, 2, 3, 4}>
        { row = Flatten(input)
          one = ReduceMean<axes = [1]>(row)
          logits = Mul(one, few) }"""
    )
    onnx.save(plain, tmp_path / "plain.onnx")
    report = verify(tmp_path / "plain.onnx", reference)
    assert report.constants is None
    assert constants_lines(report.parity) == [
        "constants: not compared, since the file is neither QDQ nor QONNX"
    ]


def test_other_runtimes_decide_only_where_they_are_named(
    reference: Reference, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was placed for ONNX Runtime: another may fuse it into another function."""
    other = Faulty("conv2/bias", at(4, lambda code: code + np.int32(4000)))
    monkeypatch.setattr(verifying, "runtimes_for", lambda path: {"other": other})
    exact = Tolerance(agreement=100.0)
    shown = verify(model, reference, others=None, tolerance=exact)
    assert [stage.decides for stage in shown.parity.stages] == [True, True, True, False]
    assert shown.failures == []
    assert any(
        "--runtime other makes its answers count" in li for li in coverage_lines(shown.parity)
    )
    named = verify(model, reference, others={"other": other}, tolerance=exact)
    assert {failure.split(":")[0] for failure in named.failures} == {"other"}


def test_a_target_that_is_not_here_proves_nothing_in_silence(
    reference: Reference, model: Path
) -> None:
    proto = onnx.load(model)
    onnx.helper.set_model_props(proto, {"sqakd.target": '"elsewhere"'})
    onnx.save(proto, model)
    with pytest.raises(SpecError, match=r"was written for 'elsewhere'.* --runtime onnxruntime"):
        verify(model, reference, others=None)
    named = verify(model, reference, others={"onnxruntime": OnnxRuntime()})
    assert [stage.name for stage in named.parity.stages][1:] == list(named_stages(OnnxRuntime()))
    assert named.failures == []


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no file .*absent\.onnx"):
        read_file(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match=r"text\.onnx is no ONNX file, or damaged"):
        read_file(tmp_path / "text.onnx")


def test_tensors_that_nobody_has_are_not_made_up(reference: Reference, model: Path) -> None:
    with pytest.raises(DataError, match=r"the reference has no tensors .* save it with --layers"):
        verify_file(model, reference, layer_samples=4, others={})

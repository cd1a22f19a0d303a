"""Operators planted in files whose effect no image at hand need show, and how they are named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
import test_families
import test_forms
import test_lifting
import test_rewriting
import torch
import torch.nn.functional as F
from networks import SHAPE, images, network
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from sqakd_deploy.api import export
from sqakd_deploy.errors import DataError
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.verification.comparing import compare_with_student
from sqakd_deploy.verification.constants import constants_of
from sqakd_deploy.verification.operators import operators_of
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.reference import Reference, load_reference, save_reference
from sqakd_deploy.verification.stages import Tolerance
from sqakd_deploy.verification.student import reference_of
from sqakd_deploy.verification.verifying import verify_file

Plant: TypeAlias = Callable[["Graph"], None]

LOOSE = Tolerance(agreement=0, mean_error=1e9)
ABOVE = np.float32(1e3)  # what no image reaches


class Attention(nn.Module):
    """What the convolutional networks of these tests have not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.max_pool2d(self.deep(x), 2)
        x = x.flatten(2).transpose(1, 2)
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        return self.head((weights @ self.value(x)).mean(1))


@dataclass
class Made:
    """A student's file, and what it is compared with, as it is saved."""

    path: Path
    reference: Reference


def made(model: nn.Module, folder: Path, target: str = "onnxruntime") -> Made:
    student: fx.GraphModule = quantize(model, QuantSpec(target=target), example=SHAPE)
    calibrate(student, images(64))
    snap_biases(student)
    save_reference(reference_of(student, [images(32)]), folder / "r.npz")
    path = export(student, folder / "m.onnx").path
    return Made(path, load_reference(folder / "r.npz"))


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(network("residual"), tmp_path_factory.mktemp("residual"))


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    return made(Attention().eval(), tmp_path_factory.mktemp("attention"))


class Graph:
    """A model to plant nodes in."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = model.graph.node

    def node(self, name: str) -> NodeProto:
        return next(node for node in self.nodes if node.name == name)

    def of(self, op_type: str, index: int = 0) -> NodeProto:
        return [node for node in self.nodes if node.op_type == op_type][index]

    def constant(self, array: Any) -> str:
        name = f"planted/{len(self.model.graph.initializer)}"
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def before(self, reader: NodeProto, *nodes: NodeProto) -> None:
        """Put nodes between a node and what it reads; each reads ``x``, the last writes ``y``."""
        place, source = list(self.nodes).index(reader), reader.input[0]
        for i, node in enumerate(nodes):
            for graph in (a.g for a in node.attribute):
                for inner in graph.node:
                    inner.input[:] = [source if name == "x" else name for name in inner.input]
            node.input[:] = [source if name == "x" else name for name in node.input]
            self.nodes.insert(place + i, node)
        reader.input[0] = "y"

    def behind(self, *nodes: NodeProto) -> None:
        """Put nodes between the logits and the output."""
        output = self.model.graph.output[0].name
        last = next(node for node in self.nodes if output in node.output)
        last.output[0] = "x"
        nodes[-1].output[0] = output
        self.nodes.extend(nodes)


def failures(made: Made, plant: Plant, folder: Path) -> list[str]:
    """What a saved reference says of a file with a fault."""
    graph = Graph(onnx.load(made.path))
    plant(graph)
    onnx.save(graph.model, folder / "planted.onnx")
    found = verify_file(folder / "planted.onnx", made.reference, others={}, tolerance=LOOSE)
    return found.failures


def test_files_as_they_are_have_none(residual: Made, attention: Made, tmp_path: Path) -> None:
    for whole in (residual, attention):
        assert failures(whole, lambda graph: None, tmp_path) == []


def at_input(*steps: tuple[str, list[Any]], **attributes: Any) -> Plant:
    """Nodes in front of the first quantizer; constants are arrays, and ``x`` is the image."""

    def plant(graph: Graph) -> None:
        nodes = []
        for i, (op_type, inputs) in enumerate(steps):
            names = [a if isinstance(a, str) else graph.constant(a) for a in inputs]
            output = "y" if i == len(steps) - 1 else f"step{i}"
            given = attributes if i == 0 else {}
            nodes.append(helper.make_node(op_type, names, [output], **given))
        graph.before(graph.node("quant_x"), *nodes)

    return plant


def half(back: str) -> Plant:
    """A rounding to float16."""

    def plant(graph: Graph) -> None:
        nodes = [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT),
        ]
        graph.before(graph.node(back), *nodes)

    return plant


def branch(graph: Graph) -> None:
    """Negates images that are brighter than any."""
    branches = {
        name: helper.make_graph(
            [helper.make_node(op_type, ["x"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name, op_type in (("then", "Neg"), ("else", "Identity"))
    }
    bright = helper.make_node("ReduceMax", ["x"], ["brightest"], keepdims=0)
    greater = helper.make_node("Greater", ["brightest", graph.constant(ABOVE)], ["bright"])
    chosen = helper.make_node(
        "If", ["bright"], ["y"], then_branch=branches["then"], else_branch=branches["else"]
    )
    graph.before(graph.node("quant_x"), bright, greater, chosen)


def function(graph: Graph) -> None:
    """An operator of the file's own, called like one that the student has."""
    opset = helper.make_opsetid("", graph.model.opset_import[0].version)
    body = [
        helper.make_node("Relu", ["X"], ["positive"]),
        helper.make_node("Constant", [], ["most"], value=numpy_helper.from_array(ABOVE)),
        helper.make_node("Min", ["positive", "most"], ["Y"]),
    ]
    own = helper.make_function("own", "Relu", ["X"], ["Y"], body, [opset])
    graph.model.functions.append(own)
    graph.model.opset_import.append(helper.make_opsetid("own", 1))
    graph.node("relu_2").domain = "own"


def coded_term(graph: Graph) -> None:
    codes = np.ones((1, 3, 1, 1), np.uint8)
    parts = [codes, np.full(3, 5e-5, np.float32), np.zeros(3, np.uint8)]
    names = [graph.constant(part) for part in parts]
    graph.before(
        graph.node("quant_x"),
        helper.make_node("DequantizeLinear", names, ["term"], axis=1),
        helper.make_node("Add", ["x", "term"], ["y"]),
    )


def shaped_term(graph: Graph) -> None:
    value = numpy_helper.from_array(np.array([5e-5], np.float32))
    graph.before(
        graph.node("quant_x"),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["term"], value=value),
        helper.make_node("Add", ["x", "term"], ["y"]),
    )


def at_output(op_type: str, name: str, *more: Any) -> Plant:
    def plant(graph: Graph) -> None:
        constants = [graph.constant(array) for array in more]
        graph.behind(helper.make_node(op_type, ["x", *constants], ["y"], name))

    return plant


def bound_on_codes(graph: Graph) -> None:
    """Of one of the two that read them."""
    bounds = [graph.constant(np.uint8(value)) for value in (0, 240)]
    graph.before(graph.node("getitem"), helper.make_node("Clip", ["x", *bounds], ["y"]))


def dead_copy(graph: Graph) -> None:
    """The layer that is wrong has lost its name to one that nothing reads."""
    layer = graph.node("conv2")
    good = copy.deepcopy(layer)
    good.output[0] = "dead"
    layer.name = ""
    graph.nodes.append(good)


PLANTED: dict[str, tuple[Plant, str]] = {
    "a branch": (branch, "the student has no If with graphs of its own of the input"),
    "a mask": (
        at_input(
            ("Greater", ["x", ABOVE]),
            ("Not", ["step0"]),
            ("Where", ["step1", "x", np.float32(0)]),
        ),
        "the student has no Greater of the input",
    ),
    "a slope": (at_input(("PRelu", ["x", np.float32(0.999)])), "no PRelu of the input"),
    "a sum of many": (at_input(("Sum", ["x", np.float32(5e-5)])), "no Sum of the input"),
    "a power": (at_input(("Pow", ["x", np.float32(1.0001)])), "no Pow of the input"),
    "fewer images": (
        at_input(("Slice", ["x", np.array([0]), np.array([64]), np.array([0])])),
        "no Slice of the input",
    ),
    "half precision": (half("quant_x"), "the student has no Cast of the input"),
    "a function of its own": (function, "relu_2: layer: the student has no own::Relu behind"),
    "a term in codes": (coded_term, "the student has no such Add of the input"),
    "a term of a shape": (shaped_term, "the student has no such Add of the input"),
    "a bound with a layer's name in its own": (
        at_output("Min", "classifier/limit", ABOVE),
        "classifier/limit: layer: the student has no Min",
    ),
    "a term with a layer's name in its own": (
        at_output("Add", "classifier/x", np.float32(1e-3)),
        "classifier/x: layer: the student has no such Add",
    ),
    "a bound on codes": (bound_on_codes, "the student has no Clip behind"),
    "a dead copy": (dead_copy, "conv2: layer: no node of the file has its name"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_an_operator_that_the_student_has_not_is_named(
    fault: str, residual: Made, tmp_path: Path
) -> None:
    plant, text = PLANTED[fault]
    found = failures(residual, plant, tmp_path)
    assert any(text in failure for failure in found), found


def with_attributes(op_type: str, **attributes: Any) -> Plant:
    def plant(graph: Graph) -> None:
        node = graph.of(op_type)
        kept = [a for a in node.attribute if a.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())

    return plant


def another(op_type: str, other: str) -> Plant:
    def plant(graph: Graph) -> None:
        graph.of(op_type).op_type = other

    return plant


SET_OTHERWISE: dict[str, tuple[Plant, str]] = {
    "softmax": (with_attributes("Softmax", axis=1), "softmax: axis: -2 in the file, -1 in the st"),
    "interpolation": (
        with_attributes("Resize", coordinate_transformation_mode="align_corners"),
        "interpolate: way of interpolating",
    ),
    "activation": (another("Sigmoid", "HardSigmoid"), "no HardSigmoid behind"),
    "logarithm": (another("Softmax", "LogSoftmax"), "operator: LogSoftmax in the file, Softmax in"),
    "window of a pool": (with_attributes("MaxPool", kernel_shape=[1, 1]), "max_pool2d: window"),
}


@pytest.mark.parametrize("fault", SET_OTHERWISE)
def test_an_operator_that_is_another_is_named(fault: str, attention: Made, tmp_path: Path) -> None:
    plant, text = SET_OTHERWISE[fault]
    found = failures(attention, plant, tmp_path)
    assert any(text in failure for failure in found), found


def test_an_idle_dropout_is_none(residual: Made, tmp_path: Path) -> None:
    for training in (False, True):
        plant = at_input(("Dropout", ["x", np.float32(0.5), np.array(training)]))
        found = failures(residual, plant, tmp_path)
        assert any("no Dropout of the input" in failure for failure in found) == training


def test_a_branch_without_inputs_is_named(residual: Made, tmp_path: Path) -> None:
    """Its graphs read the image from around them."""

    def plant(graph: Graph) -> None:
        ends = [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)]
        same = helper.make_node("Identity", ["x"], ["same"])
        inner = helper.make_graph([same], "same", [], ends)
        always = graph.constant(np.array(True))
        node = helper.make_node("If", [always], ["y"], then_branch=inner, else_branch=inner)
        graph.before(graph.node("quant_x"), node)

    found = failures(residual, plant, tmp_path)
    assert found == ["y: layer: the student has no If with graphs of its own of the input"]


def test_an_axis_may_be_counted_from_either_end(attention: Made, tmp_path: Path) -> None:
    assert failures(attention, with_attributes("Softmax", axis=2), tmp_path) == []


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_strides_are_the_students(target: str, tmp_path: Path) -> None:
    """A pool over the whole image behind them hides the size of what they give."""
    if target == "openvino":
        pytest.importorskip("openvino")
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, 2), nn.ReLU()]
    torch.manual_seed(0)
    pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    whole = made(pooled, tmp_path, target)
    assert failures(whole, lambda graph: None, tmp_path) == []

    def plant(graph: Graph) -> None:
        node = graph.of("Conv", 1)
        strides = next(a for a in node.attribute if a.name == "strides")
        strides.ints[:] = [2, 1]

    if target == "onnxruntime":  # for OpenVINO a slice has them
        found = failures(whole, plant, tmp_path)
        assert any("stride: 1 of 2 differ" in failure for failure in found), found


def test_operators_of_qonnx_files_are_named(tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    whole = made(network("residual"), tmp_path, "qonnx")
    assert failures(whole, lambda graph: None, tmp_path) == []
    for op_type, constant in (("Add", 5e-5), ("Mul", 1.0002)):
        plant = at_input((op_type, ["x", np.float32(constant)]))
        found = failures(whole, plant, tmp_path)
        assert any(f"no such {op_type} of the input" in failure for failure in found), found


UNITS: dict[str, Callable[[], nn.Module]] = {
    **test_families.UNITS,
    **test_forms.UNITS,
    **test_lifting.UNITS,
    **test_rewriting.UNITS,
}


@pytest.mark.parametrize("target", ["qonnx", "tensorrt"])
def test_files_of_every_unit_have_the_students_operators(target: str, tmp_path: Path) -> None:
    """Whatever their answers are; those for other targets are proven unit by unit."""
    if target == "qonnx":
        pytest.importorskip("qonnx")
    others = {}
    for name, build in UNITS.items():
        torch.manual_seed(0)
        student = quantize(build().eval(), QuantSpec(target=target), example=SHAPE)
        calibrate(student, images(8))
        graph, file = lower(student), read_file(export(student, tmp_path / "m.onnx").path)
        found = compare_with_student(file, constants_of(graph), operators_of(graph))
        if found:
            others[name] = [str(difference) for difference in found]
    assert others == {}


@pytest.mark.parametrize(
    ("op_type", "name", "more"),
    [
        ("Clip", "classifier/0", (np.float32(-50), np.float32(50))),
        ("Clip", "classifier/bounded", (np.float32(-50), np.float32(50))),
        ("Mul", "classifier/nothing", (np.float32(1.0000002),)),
        ("Add", "classifier/real", (np.float32(1e-7),)),
        ("Div", "classifier/steps", (np.float32(1.0000002),)),
        ("Sub", "classifier/centred", (np.float32(1e-7),)),
    ],
)
def test_a_part_is_one_of_the_kind_of_node_that_it_is_named_after(
    op_type: str, name: str, more: tuple[np.float32, ...], residual: Made, tmp_path: Path
) -> None:
    found = failures(residual, at_output(op_type, name, *more), tmp_path)
    assert any(failure.startswith(f"{name}: layer") for failure in found), found


def test_references_without_operators_are_to_be_saved_anew(residual: Made, tmp_path: Path) -> None:
    save_reference(replace(residual.reference, operators=None), tmp_path / "old.npz")
    with pytest.raises(DataError, match=r"old\.npz .*an earlier version.*save it again"):
        load_reference(tmp_path / "old.npz")

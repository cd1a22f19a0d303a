"""What the ONNX writer puts into a model, what it refuses, and whether the integers are right."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from integer_graphs import CASES, UINT8, Builder, vector
from networks import NETWORKS, SHAPE, network
from networks import images as network_images
from onnx import numpy_helper
from reference_executor import Held, Reader, run
from sqakd_exporters.qdq import EMITTERS, build_model
from sqakd_exporters.writer import Emitters, Writer
from torch import fx

import sqakd_deploy
from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError, SpecError
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import QuantSpec, TensorSpec


def model_of(graph: g.IntegerGraph, emitters: Emitters | None = None) -> onnx.ModelProto:
    return ir.to_proto(build_model(graph, ExportOptions(), emitters=emitters))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def one_linear(name: str = "fc", output: str = "y", source: str = "x") -> g.IntegerGraph:
    weight = np.ones((2, 3), np.float32)
    values = {source: g.Value(source, (None, 3)), output: g.Value(output, (None, 2))}
    return g.IntegerGraph("g", (g.Linear(name, (source,), output, weight, None),), values, source,
                          output)  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_scales_and_zero_points(name: str) -> None:
    """Rules 4, 5 and 13, on every node of every graph."""
    model = model_of(CASES[name]().graph)
    held = constants(model)
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        assert len(node.input) == 3
        scale, zero = held[node.input[1]], held[node.input[2]]
        if node.input[0] in held:  # a weight or bias
            assert scale.shape == zero.shape == held[node.input[0]].shape[:1]
            assert not zero.any()
            assert node.attribute[0].i == 0
        else:
            assert scale.shape == zero.shape == ()
            assert not node.attribute


@pytest.mark.parametrize("name", list(CASES))
def test_every_dequantizer_has_one_reader_and_every_name_is_its_own(name: str) -> None:
    model = model_of(CASES[name]().graph)
    readers = Counter(source for node in model.graph.node for source in node.input)
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            assert readers[node.output[0]] + (node.output[0] in outputs) == 1
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))
    onnx.checker.check_model(model, full_check=True)


def test_nodes_are_called_like_their_layers() -> None:
    graph = CASES["residual"]().graph
    names = {node.name for node in model_of(graph).graph.node}
    assert names >= {node.name for node in graph.nodes}


def test_a_quantizer_divides_by_its_step_and_its_readers_multiply_by_the_scale() -> None:
    graph = CASES["two_steps"]().graph
    model = model_of(graph)
    held = constants(model)
    nodes = {node.name: node for node in model.graph.node}
    readers = {node.input[0]: node for node in model.graph.node}
    for node in graph.nodes:
        if isinstance(node, g.Quantize):
            grid = graph.values[node.output].grid
            assert grid is not None
            assert held[nodes[node.name].input[1]] == node.step
    first = next(node for node in graph.nodes if node.name == "quant1")
    grid = graph.values[first.output].grid
    assert grid is not None
    assert grid.scale != first.step  # type: ignore[attr-defined]
    assert held[readers[first.output].input[1]] == grid.scale


def test_a_clip_only_where_the_grid_does_not_fill_its_type() -> None:
    b = Builder()
    x = b.quantize("full", "x", UINT8, 128)
    x = b.quantize("narrow", b.relu("relu", b.conv("conv", x, 4)), (3, 15), 3)
    model = model_of(b.graph(x))
    (clip,) = [node for node in model.graph.node if node.op_type == "Clip"]
    low, high = (constants(model)[name] for name in clip.input[1:])
    assert (low.dtype, low, high) == (np.uint8, 3, 15)
    assert low.shape == high.shape == ()


def test_padding_with_the_zero_point() -> None:
    model = model_of(CASES["shuffle"]().graph)
    (pad,) = [node for node in model.graph.node if node.op_type == "Pad"]
    zero = constants(model)[pad.input[2]]
    assert (zero.dtype, zero) == (np.uint8, 7)


def test_weights_stay_as_they_are() -> None:
    graph = CASES["mid_rise"]().graph
    held = constants(model_of(graph))
    for node in graph.nodes:
        if isinstance(node, g.Conv) and isinstance(node.weight, g.IntWeight):
            np.testing.assert_array_equal(held[f"{node.name}/weight"], node.weight.codes)
            assert np.all(held[f"{node.name}/weight"] % 2 == 1) == node.weight.mid_rise


def test_metadata_producer_and_names() -> None:
    graph = replace(vector(), metadata={"classes": "a,b", "né": "ö"})
    options = ExportOptions(input_name="pixels", output_name="scores")
    model = ir.to_proto(build_model(graph, options))
    assert {p.key: p.value for p in model.metadata_props} == {"classes": "a,b", "né": "ö"}
    assert (model.producer_name, model.producer_version) == (
        "sqakd-deploy",
        sqakd_deploy.__version__,
    )
    (source,), (output,) = model.graph.input, model.graph.output
    assert (source.name, output.name) == ("pixels", "scores")
    dims = [dim.dim_param or dim.dim_value for dim in source.type.tensor_type.shape.dim]
    assert dims == ["N", 12]
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_default_opset_is_the_lowest() -> None:
    model = model_of(vector())
    assert model.opset_import[0].version == 13
    assert model.ir_version == 7


@pytest.mark.parametrize(
    ("name", "output", "source"),
    [
        ("logits", "logits", "input"),
        ("input", "input", "logits"),
        ("fc", "fc/weight", "x"),
        ("logits", "logits_1", "input_1"),
    ],
)
def test_layers_may_be_called_like_the_input_or_output(name: str, output: str, source: str) -> None:
    model = model_of(one_linear(name, output, source))
    onnx.checker.check_model(model, full_check=True)
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["input", "logits"]


@pytest.mark.parametrize("inner", ["input", "logits", "second/weight"])
def test_an_inner_value_may_have_any_name(inner: str) -> None:
    square = np.full((3, 3), 2, np.float32)
    nodes = (
        g.Linear("first", ("x",), inner, square, None),
        g.Linear("second", (inner,), "y", square, None),
    )
    values = {name: g.Value(name, (None, 3)) for name in ("x", inner, "y")}
    model = model_of(g.IntegerGraph("g", nodes, values, "x", "y"))
    onnx.checker.check_model(model, full_check=True)
    assert len({output for node in model.graph.node for output in node.output}) == 2


def test_the_input_as_output() -> None:
    values = {"x": g.Value("x", (None, 3))}
    model = model_of(g.IntegerGraph("g", (), values, "x", "x"))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [0, 12, 26])
def test_an_opset_out_of_range(opset: int) -> None:
    with pytest.raises(ExportError, match=rf"opset: wanted 13 to 25, got {opset}"):
        build_model(vector(), ExportOptions(opset=opset))


def test_a_target_has_its_own_opsets() -> None:
    model = build_model(vector(), ExportOptions(), opsets=range(21, 23))
    assert model.opset_imports[""] == 21
    with pytest.raises(ExportError, match="opset: wanted 21 to 22, got 13"):
        build_model(vector(), ExportOptions(opset=13), opsets=range(21, 23))


@dataclass(frozen=True)
class Swish(g.Node):
    """A node that no exporter knows."""


def swish() -> g.IntegerGraph:
    values = {"x": g.Value("x", (None, 3)), "y": g.Value("y", (None, 3))}
    return g.IntegerGraph("g", (Swish("layer4.act", ("x",), "y"),), values, "x", "y")


def test_an_unknown_node_is_named() -> None:
    with pytest.raises(ExportError, match=r"node 'layer4\.act': Swish has no form"):
        model_of(swish())


def test_a_target_may_bring_its_own_form() -> None:
    def emit(writer: Writer, node: Swish) -> None:
        (x,) = writer.real(node)
        gate = writer.op("Sigmoid", [x], f"{node.output}/gate")
        writer.hold(node, writer.op("Mul", [x, gate], node.output, node.name), grid=None)

    model = model_of(swish(), emitters={**EMITTERS, Swish: emit})
    assert [node.op_type for node in model.graph.node] == ["Sigmoid", "Mul"]
    assert Swish not in EMITTERS


def test_one_name_for_input_and_output() -> None:
    with pytest.raises(SpecError, match="wanted two names, got 'x' for both"):
        build_model(vector(), ExportOptions(input_name="x", output_name="x"))


def with_bias(change: object) -> g.IntegerGraph:
    graph = CASES["plain"]().graph
    nodes = tuple(
        replace(node, bias=change(node.bias))  # type: ignore[operator]
        if isinstance(node, g.Linear) else node
        for node in graph.nodes
    )  # fmt: skip
    return replace(graph, nodes=nodes)


def test_a_bias_at_another_scale_is_refused() -> None:
    """The runtime would take it for right (rule 12)."""

    def off(bias: g.IntBias) -> g.IntBias:
        return replace(bias, scale=bias.scale * np.float32(1.001))

    with pytest.raises(ExportError, match="node 'fc': the bias scale is not input scale × weight"):
        model_of(with_bias(off))


def test_an_integer_bias_on_a_float_input_is_refused() -> None:
    graph = one_linear()
    (node,) = graph.nodes
    bias = g.IntBias(np.zeros(2, np.int32), np.ones(2, np.float32))
    nodes = (replace(node, bias=bias),)  # type: ignore[call-arg]
    with pytest.raises(ExportError, match="node 'fc': an int32 bias needs an integer input"):
        model_of(replace(graph, nodes=nodes))


def test_a_value_read_before_it_is_written() -> None:
    graph = CASES["plain"]().graph
    broken = replace(graph, nodes=graph.nodes[1:])
    with pytest.raises(ExportError, match="node 'stem' reads 'image_out', which no node before"):
        model_of(broken)


def test_an_output_that_nothing_writes() -> None:
    graph = CASES["plain"]().graph
    with pytest.raises(ExportError, match="no node writes the graph's output 'fc_quant_out'"):
        model_of(replace(graph, nodes=graph.nodes[:-1]))


def test_a_quantizer_without_a_grid() -> None:
    graph = vector()
    values = {**graph.values, "hidden_out": g.Value("hidden_out", (None, 16))}
    with pytest.raises(ExportError, match="node 'hidden': its output 'hidden_out' has no grid"):
        model_of(replace(graph, values=values))


def test_only_quantizers_change_the_grid() -> None:
    graph = CASES["plain"]().graph
    grid = graph.values["image_out"].grid
    assert grid is not None
    for name in ("stem_out", "flatten_out"):
        other = replace(graph.values[name], grid=replace(grid, scale=np.float32(9)))
        values = {**graph.values, name: other}
        with pytest.raises(ExportError, match=r"node '.*': .* only Quantize changes the grid"):
            model_of(replace(graph, values=values))


def test_only_the_batch_may_be_dynamic() -> None:
    graph = CASES["shuffle"]().graph
    other = replace(graph.values["merge_out"], shape=(None, 8, None, 8))
    with pytest.raises(ExportError, match="node 'merge': only the batch may be dynamic"):
        model_of(replace(graph, values={**graph.values, "merge_out": other}))


def test_exporters_are_free_of_torch() -> None:
    code = "import sys, sqakd_exporters.onnxruntime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- what is written is the student ------------------------------------------------------------

# PyTorch adds in float32, some 3e-7 relative off: up to 1e-4 steps at code 255. A value that close
# to the middle between two codes may get either; in pools of few-bit codes exact middles abound.
TIE = 1e-4


class Recorder(fx.Interpreter):
    """Keeps the result of every node."""

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.results[n.name] = super().run_node(n)
        return self.results[n.name]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("method", ["lsq", "ewgs"])  # one step and scale, or one of each
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_integers_of_a_student_are_the_student(name: str, method: str, bits: int) -> None:
    """Every quantizer gives PyTorch's codes, each fed with PyTorch's own codes before it."""
    teacher = network(name)
    reestimate_batch_norm(teacher, network_images(128))
    side = TensorSpec(method=method, bits=bits)
    student = quantize(teacher, QuantSpec(weights=side, activations=side), example=SHAPE)
    calibrate(student, network_images(128))
    snap_biases(student)
    graph, batch = lower(student), network_images(32, seed=5)
    recorder = Recorder(student)
    recorder.run(batch)
    held: dict[str, Held] = {graph.input: batch.double().numpy()}
    for node in graph.nodes:
        reader = Reader(graph.values, held)
        held[node.output] = run(node, reader)
        grid = graph.values[node.output].grid
        if isinstance(node, g.Quantize) and grid is not None:
            steps = reader.real(node.inputs[0]) / np.float64(node.step)
            got = recorder.results[node.output].numpy().reshape(steps.shape) / grid.scale
            codes = np.rint(got).astype(np.int64) + grid.zero_point
            np.testing.assert_allclose(got, codes - grid.zero_point, atol=TIE)  # on the grid
            differ = held[node.output] != codes
            assert np.all(np.abs(steps - np.floor(steps) - 0.5)[differ] < TIE), node.name
            assert np.all(np.abs(held[node.output] - codes) <= 1), node.name
            held[node.output] = codes

"""Why layers stay in float: each rule, by a fault planted in a file that fuses.

The files are made by hand, so that the reasons hold for any QDQ file and not for ours alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from sqakd_exporters.onnxruntime import OnnxRuntime
from sqakd_exporters.reasons import moved
from sqakd_exporters.view import GraphView

from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import Coverage

RANDOM = np.random.default_rng(0)
CHANNELS = 16  # as many as make ONNX Runtime rewrite float layers for its blocked layout (nchwc)


@dataclass
class File:
    """Nodes and constants of a model that a test may change before it is written."""

    shape: tuple[int, ...] = (CHANNELS, 6, 6)
    opset: int = 13
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=lambda: ["y"])

    def op(self, op_type: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
        name = attributes.pop("name", f"the {op_type}")
        node = helper.make_node(op_type, inputs.split(), [output], name=name, **attributes)
        self.nodes.append(node)
        return node

    def grid(self, name: str, scale: float, zero: int, dtype: str = "uint8") -> str:
        self.constants[f"{name}_s"] = np.array(scale, np.float32)
        self.constants[f"{name}_z"] = np.array(zero, dtype)
        return f"{name}_s {name}_z"

    def pair(self, source: str, output: str, grid: str) -> None:
        """QuantizeLinear and DequantizeLinear."""
        self.op("QuantizeLinear", f"{source} {grid}", f"{output}_q", name=f"Q {output}")
        self.op("DequantizeLinear", f"{output}_q {grid}", output, name=f"DQ {output}")

    def layer(self, op_type: str, codes: np.ndarray, input_scale: float, **attributes: Any) -> None:
        """A Conv or Gemm ``c`` on ``d`` with integer weights ``W`` and bias ``b``."""
        scale = RANDOM.uniform(0.01, 0.02, len(codes)).astype(np.float32)
        zeros = {"W": np.zeros(len(codes), np.int8), "b": np.zeros(len(codes), np.int32)}
        self.constants |= {"W": codes, "W_s": scale, "W_z": zeros["W"]}
        self.constants |= {"b": RANDOM.integers(-99, 99, len(codes)).astype(np.int32)}
        self.constants |= {"b_s": np.float32(input_scale) * scale, "b_z": zeros["b"]}
        for name in ("W", "b"):
            inputs = f"{name} {name}_s {name}_z"
            self.op("DequantizeLinear", inputs, f"{name}_d", axis=0, name=f"DQ {name}")
        self.op(op_type, "d W_d b_d", "c", **attributes)

    def find(self, op_type: str) -> NodeProto:
        return next(node for node in self.nodes if node.op_type == op_type)

    def by_output(self, output: str) -> NodeProto:
        return next(node for node in self.nodes if node.output[0] == output)

    def without(self, *outputs: str) -> None:
        self.nodes = [node for node in self.nodes if node.output[0] not in outputs]

    def write(self, path: Path) -> Path:
        def value(name: str, shape: object) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "g",
            [value("x", ["N", *self.shape])],
            [value(name, None) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        imports = [helper.make_opsetid("", self.opset)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
        return path


def conv() -> File:
    """x → Q → DQ → Conv → Relu → Q → DQ → y."""
    file = File()
    file.pair("x", "d", file.grid("in", 0.02, 128))
    codes = RANDOM.integers(-9, 9, size=(CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    file.layer("Conv", codes, 0.02, pads=[1] * 4)
    file.op("Relu", "c", "r")
    file.pair("r", "y", file.grid("out", 0.03, 0))
    return file


def gemm() -> File:
    """x → Q → DQ → Gemm → y, which needs no quantizer behind it."""
    file = File(shape=(CHANNELS,))
    file.pair("x", "d", file.grid("in", 0.02, 128))
    file.layer("Gemm", RANDOM.integers(-9, 9, size=(5, CHANNELS)).astype(np.int8), 0.02, transB=1)
    file.nodes[-1].output[0] = "y"
    return file


def join(op_type: str, **attributes: Any) -> File:
    """Two quantised copies of x, joined and quantised."""
    file = File()
    file.pair("x", "a", file.grid("a", 0.02, 128))
    file.pair("x", "b", file.grid("b", 0.03, 120))
    file.op(op_type, "a b", "c", **attributes)
    file.pair("c", "y", file.grid("out", 0.05, 128))
    return file


def pool(op_type: str) -> File:
    file = File()
    file.pair("x", "d", file.grid("in", 0.02, 128))
    window = {} if op_type.startswith("Global") else {"kernel_shape": [2, 2], "strides": [2, 2]}
    file.op(op_type, "d", "c", **window)
    file.pair("c", "y", file.grid("out", 0.02, 128))
    return file


def coverage(file: File, folder: Path) -> Coverage:
    return OnnxRuntime().open(file.write(folder / "file.onnx")).coverage()


@pytest.mark.parametrize(
    ("file", "layer"),
    [
        (conv(), "Conv"),
        (gemm(), "Gemm"),
        (join("Add"), "Add"),
        (join("Concat", axis=1), "Concat"),
        (pool("AveragePool"), "AveragePool"),
        (pool("GlobalAveragePool"), "GlobalAveragePool"),
        (pool("MaxPool"), "MaxPool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_a_fault_all_is_integer(file: File, layer: str, tmp_path: Path) -> None:
    found = coverage(file, tmp_path)
    assert (found.integer, found.total, found.fallbacks) == ({layer: 1}, {layer: 1}, ())


FAULTS: list[tuple[str, str]] = []  # (name, reason); filled by `fault`
PLANT: dict[str, Callable[[], File]] = {}


def fault(reason: str) -> Callable[[Callable[[], File]], Callable[[], File]]:
    """Register a function that makes a file with a fault, and the reason that must be found."""

    def register(plant: Callable[[], File]) -> Callable[[], File]:
        FAULTS.append((plant.__name__, reason))
        PLANT[plant.__name__] = plant
        return plant

    return register


@fault("output 'y' is a float output of the model (rule 1)")
def no_quantizer_behind() -> File:
    file = conv()
    file.without("y_q", "y")
    file.find("Relu").output[0] = "y"
    return file


@fault("output 'r' is not quantised but read by Sigmoid (rule 1)")
def another_reader() -> File:
    file = conv()
    file.without("y_q", "y")
    file.op("Sigmoid", "r", "y")
    return file


@fault("input 'x' is not quantised (rule 1)")
def no_quantizer_before() -> File:
    file = conv()
    file.find("Conv").input[0] = "x"
    file.without("d_q", "d")
    return file


@fault("weights are float (rule 1)")
def float_weights() -> File:
    file = conv()
    file.constants["W_f"] = file.constants["W"].astype(np.float32)
    file.find("Conv").input[1] = "W_f"
    return file


@fault("ReLU before a quantizer with zero-point 0, not -128 (rule 2)")
def int8_behind_relu() -> File:
    file = conv()
    file.grid("out", 0.03, 0, "int8")
    return file


@fault("ReLU before a quantizer with zero-point 128, not 0 (rule 2)")
def zero_point_behind_relu() -> File:
    file = conv()
    file.grid("out", 0.03, 128)
    return file


@fault("Clip to [0, 6] before a quantizer with the wider range [0, 7.65] (rule 3)")
def narrow_clip() -> File:
    file = conv()
    file.constants |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    file.nodes[file.nodes.index(file.find("Relu"))] = helper.make_node(
        "Clip", ["c", "low", "high"], ["r"], name="the clip"
    )
    return file


@fault("Clip to [0.5, inf] before a quantizer with the wider range [0, 7.65] (rule 3)")
def clip_of_one_side() -> File:
    file = conv()
    file.constants["low"] = np.array(0.5, np.float32)
    file.nodes[file.nodes.index(file.find("Relu"))] = helper.make_node(
        "Clip", ["c", "low"], ["r"], name="the clip"
    )
    return file


@fault("weights are not 8-bit integers when they are dequantised (rule 16)")
def four_bit_weights() -> File:
    file = conv()
    file.opset = 21
    file.constants["W"] = (file.constants["W"] // np.int8(2)).astype(ml_dtypes.int4)
    file.constants["W_z"] = file.constants["W_z"].astype(ml_dtypes.int4)
    return file


@fault("output 'c' goes into a BatchNormalization, which should be folded (rule 6)")
def unfolded_batch_norm() -> File:
    file = conv()
    file.constants |= {"one": np.ones(CHANNELS, np.float32), "no": np.zeros(CHANNELS, np.float32)}
    file.nodes[file.nodes.index(file.find("Relu"))] = helper.make_node(
        "BatchNormalization", ["c", "one", "no", "no", "one"], ["r"], name="the norm"
    )
    return file


@fault("output 'c' has 2 readers, not one quantizer (rule 7)")
def two_quantizers() -> File:
    file = conv()
    file.pair("c", "unused", file.grid("other", 0.04, 128))
    file.pair("unused", "y2", "other_s other_z")
    file.op("Add", "y unused", "sum", name="late")
    file.outputs = ["sum"]
    return file


@fault("bias scale is not input scale × weight scale (rule 12)")
def bias_scale() -> File:
    file = conv()
    file.constants["b_s"] = file.constants["b_s"] * np.float32(1.1)
    return file


@fault("its bias is float and the output is not quantised (rule 11)")
def float_bias_of_a_bare_gemm() -> File:
    file = gemm()
    file.constants["bias"] = np.ones(5, np.float32)
    file.find("Gemm").input[2] = "bias"
    return file


@fault("its bias is float and the output is not quantised (rule 11)")
def float_bias_behind_matmul() -> File:
    file = gemm()
    file.without("y", "b_d")
    file.constants |= {"bias": np.ones(5, np.float32), "W": file.constants["W"].T.copy()}
    file.nodes[-1].attribute[0].i = 1  # MatMul's output channels are on axis 1
    file.op("MatMul", "d W_d", "c")
    file.op("Add", "c bias", "y", name="bias add")
    return file


@fault("ReLU before a quantizer with zero-point 128, not 0 (rule 2)")
def relu_behind_gemm() -> File:
    file = gemm()
    file.nodes[-1].output[0] = "c"
    file.op("Relu", "c", "r")
    file.pair("r", "y", file.grid("out", 0.03, 128))
    return file


@fault("input 'x' is not quantised (rule 8)")
def add_of_a_float() -> File:
    file = join("Add")
    file.find("Add").input[1] = "x"
    return file


@fault("output 'y' is a float output of the model (rule 1)")
def bare_add() -> File:
    file = join("Add")
    file.without("y_q", "y")
    file.find("Add").output[0] = "y"
    return file


@fault("'a_s' has shape (1,), not () (rule 4)")
def scale_of_rank_1() -> File:
    file = join("Add")
    file.constants["a_s"] = file.constants["a_s"].reshape(1)
    file.constants["a_z"] = file.constants["a_z"].reshape(1)
    return file


@fault("input 'a' is neither int8 nor uint8 (rule 15)")
def sixteen_bits() -> File:
    file = join("Add")
    file.opset = 21
    for name in ("a", "b", "out"):
        file.grid(name, 0.001, 30000, "uint16")
    return file


@fault("scale or zero-point differ before and after it (rule 9)")
def max_pool_between_scales() -> File:
    file = pool("MaxPool")
    file.grid("out", 0.03, 128)
    return file


@fault("output 'y' is a float output of the model (rule 1)")
def bare_average_pool() -> File:
    file = pool("AveragePool")
    file.without("y_q", "y")
    file.find("AveragePool").output[0] = "y"
    return file


@fault("the runtime has no integer ConvTranspose (rule 10)")
def transposed_conv() -> File:
    file = conv()
    file.find("Conv").op_type = "ConvTranspose"
    return file


@fault("activations are int8; on x86 the runtime makes them uint8 only where")
def int8_codes_that_are_clipped() -> File:
    file = conv()
    file.grid("in", 0.02, 0, "int8")
    file.grid("out", 0.03, -8, "int8")
    file.constants |= {"low": np.array(-8, np.int8), "high": np.array(7, np.int8)}
    file.without("r")
    quantizer, dequantizer = file.by_output("y_q"), file.by_output("y")
    quantizer.input[0] = "c"
    clip = helper.make_node("Clip", ["y_q", "low", "high"], ["y_c"], name="codes")
    file.nodes.insert(file.nodes.index(dequantizer), clip)
    dequantizer.input[0] = "y_c"
    return file


@pytest.mark.parametrize(("name", "reason"), FAULTS, ids=[name for name, _ in FAULTS])
def test_a_planted_fault_is_found(name: str, reason: str, tmp_path: Path) -> None:
    file = PLANT[name]()
    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool")
    layer = next(node for node in file.nodes if node.op_type in layers)
    found = coverage(file, tmp_path)
    reasons = {fallback.node: fallback.reason for fallback in found.fallbacks}
    assert reason in reasons[layer.name]
    assert {fallback.op_type for fallback in found.fallbacks} >= {layer.op_type}


@pytest.mark.parametrize("name", [name for name, _ in FAULTS])
def test_without_names_a_layer_is_called_by_its_output(name: str, tmp_path: Path) -> None:
    named = PLANT[name]()
    file = PLANT[name]()
    for node in file.nodes:
        node.name = ""
    by_name = {f.node: f.reason for f in coverage(named, tmp_path).fallbacks}
    outputs = {node.output[0]: node.name for node in named.nodes}
    for fallback in coverage(file, tmp_path).fallbacks:
        assert by_name[outputs[fallback.node]] == fallback.reason


@pytest.mark.parametrize("name", ["zero_point_behind_relu", "narrow_clip", "clip_of_one_side"])
def test_numbers_with_a_shape_give_the_same_reason(name: str, tmp_path: Path) -> None:
    """Scales, zero-points and bounds of shape (1,), as other tools write them."""
    file = PLANT[name]()
    for constant in ("in_s", "in_z", "out_s", "out_z", "low", "high"):
        if constant in file.constants:
            file.constants[constant] = file.constants[constant].reshape(1)
    reasons = {fallback.node: fallback.reason for fallback in coverage(file, tmp_path).fallbacks}
    assert dict(FAULTS)[name] in reasons[file.find("Conv").name]


def test_a_shape_makes_no_other_scale(tmp_path: Path) -> None:
    file = pool("MaxPool")
    file.constants["out_s"] = file.constants["out_s"].reshape(1)
    view = GraphView(onnx.load(file.write(tmp_path / "file.onnx")))
    assert moved(view, file.find("MaxPool")) is None


def test_a_bias_scale_within_the_runtimes_tolerance_is_fused(tmp_path: Path) -> None:
    """And computed as if it were right: why the writer refuses it (rule 12)."""
    for factor, fused in ((1.009, True), (1.014, False)):
        file = conv()
        file.constants["b_s"] = file.constants["b_s"] * np.float32(factor)
        assert coverage(file, tmp_path).integer.get("Conv", 0) == fused


def test_a_scale_of_rank_1_keeps_an_average_pool_from_loading(tmp_path: Path) -> None:
    file = pool("AveragePool")
    file.constants["in_s"] = file.constants["in_s"].reshape(1)
    file.constants["in_z"] = file.constants["in_z"].reshape(1)
    with pytest.raises(ExportError, match=r"cannot load .*file\.onnx: .*must be a scalar"):
        coverage(file, tmp_path)


def test_an_add_that_a_float_conv_swallows_is_counted(tmp_path: Path) -> None:
    file = File()
    file.constants["W"] = RANDOM.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    file.op("Conv", "x W", "c", pads=[1] * 4, name="conv")
    file.op("Add", "c x", "a", name="add")
    file.op("Relu", "a", "y", name="relu")
    found = coverage(file, tmp_path)
    assert dict(found.total) == {"Conv": 1, "Add": 1}
    assert {fallback.node for fallback in found.fallbacks} == {"conv", "add"}


def test_arithmetic_on_shapes_and_weights_is_no_layer(tmp_path: Path) -> None:
    """Weights restored from packed codes (rule 17) and shapes computed from the batch."""
    file = gemm()
    file.opset = 21
    odd = (2 * RANDOM.integers(-4, 4, size=(5, CHANNELS)) + 1).astype(np.int8)
    file.constants |= {"k": (odd - 1) // np.int8(2), "one": np.array(1, np.int8)}
    restore = [
        helper.make_node("Add", ["k", "k"], ["k2"], name="double"),
        helper.make_node("Add", ["k2", "one"], ["restored"], name="plus one"),
    ]
    file.nodes[:0] = restore
    file.by_output("W_d").input[0] = "restored"
    file.nodes[-1].output[0] = "c"
    file.constants |= {"zero": np.array([0]), "five": np.array([5]), "none": np.array([0])}
    file.op("Shape", "x", "shape", name="shape")
    file.op("Gather", "shape zero", "batch", name="batch")
    file.op("Add", "batch none", "same", name="same batch")
    file.op("Concat", "same five", "sizes", axis=0, name="sizes")
    file.op("Reshape", "c sizes", "y", name="reshape")
    for optimize in (True, False):
        path = file.write(tmp_path / "file.onnx")
        found = OnnxRuntime().open(path, optimize=optimize).coverage()
        assert dict(found.total) == {"Gemm": 1}


def test_codes_of_a_gemm_are_joined_as_integers(tmp_path: Path) -> None:
    """Shape inference knows no QGemm: what it writes is told by whether it has a scale for it."""
    file = gemm()
    file.nodes[-1].output[0] = "c"
    grid = file.grid("out", 0.05, 128)
    file.op("QuantizeLinear", f"c {grid}", "codes")
    file.op("Concat", "codes codes", "both", axis=1)
    file.op("DequantizeLinear", f"both {grid}", "y")
    found = coverage(file, tmp_path)
    assert found.fallbacks == ()
    assert found.integer == {"Gemm": 1, "Concat": 1}


@pytest.mark.parametrize("blocked", [True, False])
def test_a_batch_norm_in_float_is_listed(blocked: bool, tmp_path: Path) -> None:
    """Beside float convolutions ONNX Runtime makes a convolution of it (blocked layout)."""
    file = File()
    file.constants |= {name: RANDOM.uniform(1, 2, CHANNELS).astype(np.float32) for name in "sbmv"}
    source = "x"
    if blocked:
        file.constants["W"] = RANDOM.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
        file.op("Conv", "x W", "c", pads=[1] * 4, name="conv")
        file.op("Relu", "c", "r", name="relu")
        source = "r"
    file.op("BatchNormalization", f"{source} s b m v", "y", name="norm")
    found = coverage(file, tmp_path)
    assert dict(found.total) == {"BatchNormalization": 1} | ({"Conv": 1} if blocked else {})
    reasons = {fallback.node: fallback.reason for fallback in found.fallbacks}
    assert reasons["norm"] == "the runtime has no integer BatchNormalization (rule 10)"


def test_a_float_conv_named_as_a_norm_is_found(tmp_path: Path) -> None:
    """ONNX Runtime names what it makes of a norm so; a layer may be called so as well."""
    file = File()
    file.constants["W"] = RANDOM.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    file.op("Conv", "x W", "mid_bn", pads=[1] * 4, name="mid_bn")
    file.op("Conv", "mid_bn W", "y", pads=[1] * 4, name="last")
    fallback, _ = coverage(file, tmp_path).fallbacks
    assert (fallback.node, fallback.op_type) == ("mid_bn", "Conv")
    assert fallback.reason.startswith("input 'x' is not quantised (rule 1)")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ('{"exclude": ["stem", "b*dy"]}', "excluded from quantization ('b*dy')"),
        ('{"exclude": ["head"]}', "weights are float (rule 1)"),
        ('{"exclude": 3}', "weights are float (rule 1)"),
        ("no json", "weights are float (rule 1)"),
    ],
)
def test_a_layer_that_a_person_excluded_breaks_no_rule(
    spec: str, reason: str, tmp_path: Path
) -> None:
    file = float_weights()
    file.find("Conv").name = "body"
    model = onnx.load(file.write(tmp_path / "file.onnx"))
    helper.set_model_props(model, {"sqakd.spec": spec})
    onnx.save(model, tmp_path / "file.onnx")
    (fallback,) = OnnxRuntime().open(tmp_path / "file.onnx").coverage().fallbacks
    assert fallback.reason == reason


# -- operators of other people's files ------------------------------------------------------------


def between_quantizers(op_type: str, inputs: str = "d", **attributes: Any) -> File:
    """x → Q → DQ → an operator → Q → DQ → y."""
    file = File(opset=20)
    file.pair("x", "d", file.grid("in", 0.02, 128))
    file.op(op_type, inputs, "c", **attributes)
    file.pair("c", "y", file.grid("out", 0.05, 128))
    return file


NORM = {"one": np.ones(CHANNELS, np.float32), "no": np.zeros(CHANNELS, np.float32)}
FLOATS = [
    between_quantizers("Sub", "d d"),
    between_quantizers("Max", "d d"),
    between_quantizers("Erf"),
    between_quantizers("GlobalMaxPool"),
    between_quantizers("LpPool", kernel_shape=[2, 2]),
    between_quantizers("InstanceNormalization", "d one no"),
    between_quantizers("ReduceMax", keepdims=1),
    between_quantizers("HardSwish"),  # which the runtime knows as two operators
    between_quantizers("Mish"),  # and this as three
]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("file", FLOATS, ids=[file.nodes[2].op_type for file in FLOATS])
def test_every_operator_that_computes_in_float_counts(
    file: File, named: bool, tmp_path: Path
) -> None:
    layer = file.nodes[2]
    file.constants |= NORM if "one" in layer.input else {}
    layer.name = "layer" if named else ""
    (fallback,) = coverage(file, tmp_path).fallbacks
    assert coverage(file, tmp_path).total == {layer.op_type: 1}
    assert fallback.node == ("layer" if named else "c")
    assert fallback.reason == f"the runtime has no integer {layer.op_type} (rule 10)"


@pytest.mark.parametrize(
    "file",
    [
        between_quantizers("DepthToSpace", blocksize=2),
        between_quantizers("Transpose", perm=[0, 1, 3, 2]),
        between_quantizers("Relu"),
        between_quantizers("Max", "d zero"),
    ],
    ids=lambda file: file.nodes[2].op_type,
)
def test_what_moves_or_bounds_is_no_layer(file: File, tmp_path: Path) -> None:
    file.constants |= {"zero": np.array(3.0, np.float32)}
    assert coverage(file, tmp_path).total == {}


@pytest.mark.parametrize("op_type", ["Div", "Sub"])
def test_what_would_prepare_pixels_is_a_layer_of_other_values(op_type: str, tmp_path: Path) -> None:
    file = between_quantizers(op_type, "d three")
    file.constants |= {"three": np.array(3.0, np.float32)}
    assert coverage(file, tmp_path).total == {op_type: 1}


def test_an_integer_softmax_counts_as_one(tmp_path: Path) -> None:
    found = coverage(between_quantizers("Softmax", axis=1), tmp_path)
    assert (found.integer, found.total) == ({"Softmax": 1}, {"Softmax": 1})


def test_what_merges_into_float_layers_counts(tmp_path: Path) -> None:
    """Activations in convolutions, in blocked layout and beside it; ``x · sigmoid(x)``."""
    file = File(opset=18)
    file.constants["W"] = RANDOM.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    file.op("Conv", "x W", "c", pads=[1] * 4, name="first")
    file.op("HardSigmoid", "c", "g", alpha=1 / 6, beta=0.5, name="gate")
    file.op("Mul", "c g", "h", name="hard-swish")
    file.op("Conv", "h W", "c2", pads=[1] * 4, name="second")
    file.op("Sigmoid", "c2", "s", name="silu gate")
    file.op("Mul", "c2 s", "m", name="silu")
    file.op("Conv", "m W", "c3", pads=[1] * 4, name="third")
    file.op("Sigmoid", "c3", "s2", name="sigmoid")
    file.op("Mul", "s2 m", "y", name="product")
    wanted = {"Conv": 3, "HardSigmoid": 1, "Sigmoid": 2, "Mul": 3}
    path = file.write(tmp_path / "file.onnx")
    for optimize in (True, False):
        found = OnnxRuntime().open(path, optimize=optimize).coverage()
        assert found.total == wanted
        names = [fallback.node for fallback in found.fallbacks]
        assert sorted(names) == sorted(node.name for node in file.nodes)


def test_what_the_runtime_joins_counts_as_the_files_operators(tmp_path: Path) -> None:
    """A LayerNormalization of older opsets, whose factor and term are no layers of their own."""
    file = File(shape=(CHANNELS,), opset=16)
    file.constants |= NORM | {"two": np.array(2, np.float32), "e": np.array(1e-5, np.float32)}
    file.op("ReduceMean", "x", "mean", axes=[-1], name="mean")
    file.op("Sub", "x mean", "d", name="difference")
    file.op("Pow", "d two", "p", name="square")
    file.op("ReduceMean", "p", "v", axes=[-1], name="variance")
    file.op("Add", "v e", "ve", name="epsilon")
    file.op("Sqrt", "ve", "r", name="root")
    file.op("Div", "d r", "n", name="quotient")
    file.op("Mul", "n one", "k", name="factor")
    file.op("Add", "k no", "y", name="term")
    found = coverage(file, tmp_path)
    assert found.total == {"ReduceMean": 2, "Sub": 1, "Pow": 1, "Sqrt": 1, "Div": 1}


def test_initializers_that_are_inputs_keep_layers_in_float(tmp_path: Path) -> None:
    """Callers may change them, unless the file is of an IR version in which all are inputs."""
    file = conv()
    model = onnx.load(file.write(tmp_path / "file.onnx"))
    inputs = [
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    ]
    model.graph.input.extend(inputs)
    onnx.save(model, tmp_path / "file.onnx")
    (fallback,) = OnnxRuntime().open(tmp_path / "file.onnx").coverage().fallbacks
    assert (fallback.node, fallback.op_type) == ("the Conv", "Conv")
    assert fallback.reason.startswith("initializers that it depends on are inputs of the graph")
    model.ir_version = 3
    onnx.save(model, tmp_path / "file.onnx")
    assert OnnxRuntime().open(tmp_path / "file.onnx").coverage().integer == {"Conv": 1}


@pytest.mark.parametrize("optimize", [True, False])
def test_weights_in_another_file_are_found(
    optimize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime's graph, which is written elsewhere, still names it."""
    file = conv()
    model = onnx.load(file.write(tmp_path / "file.onnx"))
    onnx.save(
        model,
        tmp_path / "apart.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=64,
    )
    monkeypatch.chdir(tmp_path)
    found = [
        OnnxRuntime().open(Path(name), optimize=optimize).coverage()
        for name in ("file.onnx", "apart.onnx")
    ]
    assert found[0] == found[1]
    assert found[0].total == {"Conv": 1}

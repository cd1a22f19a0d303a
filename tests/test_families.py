"""Operators beyond ReLU networks: gates, norms, attention, transposed convolutions; real families.

Every unit network is run three ways that share no code: the student in PyTorch, the integer graph
in numpy, and the file in ONNX Runtime, unoptimised and optimised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import reference_executor
import torch
import torch.nn.functional as F
from networks import SHAPE, exact_here, images, randomise_norms
from sqakd_exporters.floats import FLOAT_EMITTERS
from sqakd_exporters.onnxruntime import OnnxRuntime
from torch import Tensor, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.api import export
from sqakd_deploy.errors import ExportError, ModelError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.exporting import Coverage, ExportOptions, FloatFallback, PlacementRules
from sqakd_deploy.lowering.exact import in_integers
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.parity import ParityReport, verify
from sqakd_deploy.placement import place
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.retargeting import changes
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.tracing.attention import OpenAttention, open_attention
from sqakd_deploy.tracing.trace import trace
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.verification.comparing import compare_with_student
from sqakd_deploy.verification.constants import constants_of
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.isolating import isolate, isolator_of
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.student import record, reference_of
from sqakd_deploy.verification.tables import coverage_lines
from sqakd_deploy.verification.verifying import verify_file

# As in test_export_contract: float noise of some 1e-7 puts a code of an image in some tens on the
# other side of a rounding boundary; through the layers behind that is a few steps of a logit.
RARELY = 0.05
FEW_STEPS = 4.0

# Logits that are all alike agree whatever the file computes.
SPREAD = 8.0


class Unit(nn.Module):
    """Convolution, what is to be tested on ``(N, 8, 8, 8)``, convolution, classifier."""

    def __init__(self, middle: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.middle = middle
        self.conv = nn.Conv2d(channels, 12, 3, padding=1)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.middle(self.stem(x))).relu()
        return self.classifier(x.mean([2, 3]))


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SqueezeExcite(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(x)
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return self.gate(scale) * y


class ChannelLast(nn.Module):
    """ConvNeXt's block: norm and linears over the last axis, a factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8, eps=1e-6)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.linspace(-1.0, 2.0, 8).reshape(8, 1, 1))
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.norm.bias.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class Transformer(nn.Module):
    """Patches, class token, positions, one block of attention, the token's classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 17, 12))
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.attention.in_proj_bias.data.normal_()
        self.attention.out_proj.bias.data.normal_()
        self.last_norm = nn.LayerNorm(12, elementwise_affine=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], 12, 16).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head(self.last_norm(x + y)[:, 0])


UNITS: dict[str, Callable[[], nn.Module]] = {
    "hard_swish": lambda: Unit(nn.Hardswish()),
    "hard_sigmoid": lambda: Unit(nn.Hardsigmoid()),
    "sigmoid": lambda: Unit(nn.Sigmoid()),
    "silu": lambda: Unit(nn.SiLU(inplace=True)),
    "gelu": lambda: Unit(nn.GELU()),
    "gelu_tanh": lambda: Unit(nn.GELU("tanh")),
    "leaky_relu": lambda: Unit(nn.LeakyReLU(0.1, inplace=True)),
    "parametric_relu": lambda: Unit(nn.PReLU(8)),
    "tanh": lambda: Unit(nn.Tanh()),
    "unit_length": lambda: Unit(Call(lambda x: F.normalize(x, dim=1))),
    "unit_length_then_gelu": lambda: Unit(Call(lambda x: F.gelu(F.normalize(x, dim=1)))),
    "log_softmax": lambda: nn.Sequential(Unit(nn.ReLU()), nn.LogSoftmax(1)),
    "product": lambda: Unit(Call(lambda x: x * F.relu(x))),
    "square": lambda: Unit(Call(lambda x: x * x)),
    "quotient": lambda: Unit(Call(lambda x: x / (x.norm(dim=1, keepdim=True) + 0.1))),
    "bilinear": lambda: Unit(Call(lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"))),
    "bilinear_by_7_8": lambda: Unit(Call(lambda x: F.interpolate(x, (7, 7), mode="bilinear"))),
    "whole_batch": lambda: Unit(Call(lambda x: x[0:, :, 1:][::1, ..., 1:])),
    "factor": lambda: Unit(Call(lambda x: F.hardswish(x) * 0.5)),
    "in_place": lambda: Unit(Call(lambda x: torch.sigmoid(x).mul_(x))),
    "excite_sigmoid": lambda: Unit(SqueezeExcite(nn.Sigmoid())),
    "excite_hard": lambda: Unit(SqueezeExcite(nn.Hardsigmoid())),
    "softmax": lambda: Unit(nn.Softmax(dim=1)),
    "channel_last": lambda: Unit(ChannelLast()),
    "transposed": lambda: Unit(
        nn.Sequential(nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm2d(6)), 6
    ),
    "transformer": Transformer,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_spread(UNITS[name]())


def with_spread(model: nn.Module) -> nn.Module:
    """Torch's small first weights make all logits alike."""
    randomise_norms(model)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data *= 2.0
    reestimate_batch_norm(model, images(128))
    return model


def student_of(model: nn.Module, spec: QuantSpec | None = None) -> torch.fx.GraphModule:
    student = quantize(model, spec, example=SHAPE)
    calibrate(student, images(64))
    snap_biases(student)
    return student


@cache
def unit(name: str) -> torch.fx.GraphModule:
    """The student of a unit by the default spec, made once: tests only read it."""
    return student_of(made(name))


def proven(student: torch.fx.GraphModule, path: Path) -> tuple[ParityReport, Coverage]:
    """The report on a student's file, whose logits differ enough between images to prove it."""
    artifact = export(student, path / "model.onnx")
    batch = images(128, seed=5)
    report = verify(artifact, student, batch)
    with torch.no_grad():
        assert float(student(batch).std(0).max()) > SPREAD * report.output_step
    for stage in report.stages:
        assert stage.mean_error < RARELY
        assert stage.max_error <= FEW_STEPS
    return report, report.coverage


FLOATS: dict[str, dict[str, int]] = {
    "hard_swish": {"HardSigmoid": 1, "Mul": 1},
    "hard_sigmoid": {"HardSigmoid": 1},
    "silu": {"Sigmoid": 1, "Mul": 1},
    "gelu": {"Gelu": 1},
    "gelu_tanh": {"Gelu": 1},
    "factor": {"HardSigmoid": 1, "Mul": 2},
    "excite_sigmoid": {"Sigmoid": 1, "Mul": 1},
    "excite_hard": {"Sigmoid": 1, "Mul": 1, "HardSigmoid": 1},
    "quotient": {"Add": 1, "Div": 1, "ReduceL2": 1},
    "bilinear": {"Resize": 1},
    "bilinear_by_7_8": {"Resize": 1},
    "unit_length": {"Div": 1, "ReduceL2": 1},
    "log_softmax": {"LogSoftmax": 1},
    "parametric_relu": {"PRelu": 1},
    "softmax": {"Softmax": 1},
    "tanh": {"Tanh": 1},
    "unit_length_then_gelu": {"Div": 1, "Gelu": 1, "ReduceL2": 1},
    "channel_last": {"LayerNormalization": 1, "Gelu": 1},
    "transformer": {"Add": 1, "LayerNormalization": 2, "Mul": 1, "Softmax": 1},
}
"""What stays in float, by operator; attention's products run in integers, its factor does not."""


@pytest.mark.parametrize("name", UNITS)
def test_units_are_the_student_and_list_what_stays_in_float(name: str, tmp_path: Path) -> None:
    student = unit(name)
    _, coverage = proven(student, tmp_path)
    left = {kind: n - coverage.integer.get(kind, 0) for kind, n in coverage.total.items()}
    assert {kind: n for kind, n in left.items() if n} == FLOATS.get(name, {})
    assert len(coverage.fallbacks) == sum(left.values())
    assert all("rule" in fallback.reason for fallback in coverage.fallbacks)
    same_in_numpy(student)


def test_the_units_use_every_float_node() -> None:
    graphs = [lower(unit(name)) for name in UNITS]
    kinds = {type(node) for graph in graphs for node in graph.nodes}
    assert kinds >= {*FLOAT_EMITTERS, ir.Mul}


def same_in_numpy(student: torch.fx.GraphModule) -> None:
    graph = lower(student)
    batch = images(16, seed=5)
    with torch.no_grad():
        wanted = student(batch).double().numpy()
    grid = graph.values[graph.output].grid
    assert grid is not None
    steps = np.abs(reference_executor.logits(graph, batch.numpy()) - wanted) / grid.scale
    assert steps.mean() < RARELY
    assert steps.max() <= FEW_STEPS


@pytest.mark.parametrize("name", ["silu", "excite_hard", "channel_last", "transformer"])
@pytest.mark.parametrize("method", ["ewgs", "dorefa"])
def test_units_with_other_methods_and_bits(name: str, method: str, tmp_path: Path) -> None:
    side = TensorSpec(method=method, bits=3)
    proven(student_of(made(name), QuantSpec(weights=side, activations=side)), tmp_path)


ELSEWHERE = {
    "openvino": {
        "hard_swish": {"HardSigmoid": 1, "Mul": 1},
        "silu": {"Sigmoid": 1, "Mul": 1},
        "gelu": {"Gelu": 1},
        "softmax": {"Softmax": 1},
        "channel_last": {"LayerNormalization": 1, "Gelu": 1},
    },
    "qonnx": {
        "hard_swish": {"HardSigmoid": 1, "Mul": 1},
        "sigmoid": {"Sigmoid": 1},
        "gelu": {"Gelu": 1},
        "product": {},
        "channel_last": {"LayerNormalization": 1, "Gelu": 1},
    },
}
"""What other targets leave in float, of those operators that no runtime has integers for."""

_REAL = {kind for floats in [*FLOATS.values(), {"BatchNormalization": 0}] for kind in floats}


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, names in ELSEWHERE.items() for name in names]
)
def test_other_targets_list_what_stays_in_float(target: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    student = student_of(made(name), exact_here(QuantSpec(target=target)))
    artifact = export(student, tmp_path / "model.onnx")
    coverage = verify(artifact, student, images(8)).coverage
    left = Counter(fallback.op_type for fallback in coverage.fallbacks)
    assert {kind: n for kind, n in left.items() if kind in _REAL - {"Add"}} == ELSEWHERE[target][
        name
    ]
    assert all(fallback.reason for fallback in coverage.fallbacks)


def test_parts_of_a_gate_are_named_by_the_whole(tmp_path: Path) -> None:
    _, coverage = proven(unit("silu"), tmp_path)
    assert {fallback.reason for fallback in coverage.fallbacks} == {
        "it is part of a SiLU, for which the runtime has no integer kernel (rule 10)"
    }


CONSTANTS = [
    ("channel_last", "LayerNormalization", 1, "scale"),
    ("channel_last", "LayerNormalization", 2, "shift"),
    ("factor", "Mul", 1, "constant"),
    ("transformer", "Add", 1, "constant"),
    ("transformer", "Expand", 0, "constant"),
]


def plant_in_float(student: torch.fx.GraphModule, folder: Path, kind: str, place: int) -> Path:
    """A student's file with the first number of a float operator's constant a quarter larger."""
    path = export(student, folder / "m.onnx").path
    model = onnx.load(path)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(
        n for n in model.graph.node if n.op_type == kind and n.name and n.input[place] in held
    )
    tensor = held[node.input[place]]
    changed = onnx.numpy_helper.to_array(tensor).copy()
    changed.reshape(-1)[0] *= 1.25
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, tensor.name))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(("name", "kind", "place", "constant"), CONSTANTS)
def test_a_wrong_constant_of_a_float_operator_is_found(
    name: str, kind: str, place: int, constant: str, tmp_path: Path
) -> None:
    student = unit(name)
    path = plant_in_float(student, tmp_path, kind, place)
    (difference,) = verify(path, student, images(8)).constants or ()
    assert (difference.constant, difference.count) == (constant, 1)


def test_a_wrong_gain_that_no_constant_tells_of_fails(tmp_path: Path) -> None:
    student = unit("channel_last")
    path = plant_in_float(student, tmp_path, "LayerNormalization", 1)
    options = {"layer_samples": 8, "recorder": lambda i: record(student, i), "others": {}}
    reference = replace(reference_of(student, [images(16)]), constants=None)
    report = verify_file(path, reference, isolator=isolator_of(student), **options)
    assert report.constants is None
    assert any("wrong on its own" in failure for failure in report.failures)


def test_many_alike_share_a_line(tmp_path: Path) -> None:
    report, coverage = proven(unit("silu"), tmp_path)
    gate, product = (f"in float: {f.node} ({f.op_type}): {f.reason}" for f in coverage.fallbacks)
    assert coverage_lines(report)[1:3] == [gate, product]
    (reason,) = {f.reason for f in coverage.fallbacks}
    several = tuple(FloatFallback(f"layer{i}", "Mul", reason) for i in range(4))
    lines = coverage_lines(replace(report, coverage=replace(coverage, fallbacks=several)))
    assert lines[1] == f"in float: 4 Mul (layer0 to layer3): {reason}"


def test_a_constant_operand_is_named_as_one(tmp_path: Path) -> None:
    _, coverage = proven(unit("transformer"), tmp_path)
    reasons = {f.op_type: f.reason for f in coverage.fallbacks}
    assert reasons["Add"] == "it reads a float constant (rule 8)"
    assert reasons["Mul"] == "it multiplies by a float constant (rule 8)"


def test_products_in_float_are_told_alike_and_without_names(tmp_path: Path) -> None:
    spec = QuantSpec(placement="paper", output_bits=8)
    _, coverage = proven(student_of(made("transformer"), spec), tmp_path)
    assert {f.reason for f in coverage.fallbacks if f.op_type == "MatMul"} == {
        f"it multiplies two activations, of which {kind} leaves one in float (rule 1)"
        for kind in ("Transpose", "Softmax")
    }


@pytest.mark.parametrize(("target", "products"), [("openvino", False), ("qonnx", True)])
def test_attention_in_other_runtimes(target: str, products: bool, tmp_path: Path) -> None:
    """With an open batch OpenVINO loses a bias where a class token's shape is computed (O14)."""
    pytest.importorskip(target)
    student = student_of(made("transformer"), exact_here(QuantSpec(target=target)))
    report, coverage = proven(student, tmp_path)
    assert [stage.max_error < RARELY for stage in report.stages] == [True] * len(report.stages)
    assert coverage.integer["Gemm"] >= 5
    assert coverage.integer.get("MatMul", 0) == (2 if products else 0)
    trained, other = PlacementRules(integer_products=products), PlacementRules()
    said = [] if products else ["2 products of activations would multiply codes"]
    assert changes(lower(student), trained, other) == said


@pytest.mark.parametrize("target", ["onnxruntime", "qonnx"])
def test_the_epsilon_of_a_norm_is_a_constant(target: str, tmp_path: Path) -> None:
    """Ten times as large it moves values by less than rounding may."""
    pytest.importorskip(target)
    student = student_of(made("channel_last"), QuantSpec(target=target))
    path, expected = export(student, tmp_path / "m.onnx").path, constants_of(lower(student))
    assert compare_with_student(read_file(path), expected) == []
    proto = onnx.load(path)
    (norm,) = [n for n in proto.graph.node if n.op_type == "LayerNormalization"]
    (epsilon,) = [a for a in norm.attribute if a.name == "epsilon"]
    epsilon.f *= 10
    onnx.save(proto, path)
    (difference,) = compare_with_student(read_file(path), expected)
    assert (difference.layer, difference.constant) == (norm.name, "epsilon")


# -- placement --------------------------------------------------------------------------------


def test_no_quantizer_stands_between_float_operators() -> None:
    graph = lower(student_of(Unit(Call(lambda x: F.gelu(F.hardswish(x))))))
    (gelu,) = [n for n in graph.nodes if isinstance(n, ir.Activation) and n.function == "gelu"]
    (swish,) = [n for n in graph.nodes if isinstance(n, ir.Activation) and n.function != "gelu"]
    assert gelu.inputs == (swish.output,)
    assert graph.values[swish.inputs[0]].grid is not None


def test_sigmoids_are_quantised_from_0_to_1() -> None:
    model = Unit(SqueezeExcite(nn.Sigmoid()))
    placement = place(trace(model, SHAPE), QuantSpec())
    (gate,) = [p for p in placement.activations if str(p.after.target) == "middle.gate"]
    assert (gate.bits, gate.signed, gate.limit) == (8, False, 1.0)


def test_paper_placement_leaves_activations_between_floats(tmp_path: Path) -> None:
    student = student_of(made("silu"), QuantSpec(placement="paper", output_bits=8))
    report = verify(export(student, tmp_path / "m.onnx"), student, images(64, seed=5))
    assert max(stage.max_error for stage in report.stages) <= FEW_STEPS


# -- attention --------------------------------------------------------------------------------


def test_opened_attention_answers_as_torchs() -> None:
    closed = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    closed.in_proj_bias.data.normal_()
    holder = nn.ModuleDict({"attention": closed})
    open_attention(holder)
    opened = holder["attention"]
    assert isinstance(opened, OpenAttention)
    tokens = torch.randn(2, 7, 12)
    memory = torch.randn(2, 5, 12)
    for query, key in ((tokens, tokens), (tokens, memory)):
        wanted, _ = closed(query, key, key, need_weights=False)
        torch.testing.assert_close(opened(query, key, key)[0], wanted)


def test_the_model_keeps_its_own_attention() -> None:
    model = made("transformer")
    quantize(model, example=SHAPE)
    assert isinstance(model.attention, nn.MultiheadAttention)


def test_masks_are_refused() -> None:
    opened = OpenAttention(nn.MultiheadAttention(4, 1, batch_first=True))
    x = torch.zeros(1, 2, 4)
    with pytest.raises(ModelError, match="attention with a mask has no form here"):
        opened(x, x, x, attn_mask=torch.zeros(2, 2))


def test_other_attention_is_refused_by_name() -> None:
    holder = nn.ModuleDict({"self": nn.MultiheadAttention(4, 1, add_zero_attn=True)})
    message = r"layer 'self' \(MultiheadAttention\): batch_first=False, add_zero_attn has no form"
    with pytest.raises(ModelError, match=message):
        open_attention(holder)


# -- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["channel_last", "transformer", "transposed"])
def test_bare_parameters_and_new_layers_learn(name: str, tmp_path: Path) -> None:
    teacher = made(name)
    student = quantize(teacher, example=SHAPE)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    config = DistillConfig(epochs=2, batch_size=32, lr=3e-3, bn_images=128)
    distill(student, images(128), teacher=teacher, config=config)
    still = [n for n, p in student.named_parameters() if torch.equal(p, before[n])]
    # softmax does not see what is added to all keys; an activation's range may be out of reach
    assert [n for n in still if "quant" not in n and n != "attention.key.bias"] == []
    proven(student, tmp_path)


# -- transposed convolutions ------------------------------------------------------------------


@pytest.mark.parametrize(("method", "per_channel"), [("lsq", False), ("ewgs", True)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra", "dilation", "groups", "norm"),
    [
        (2, 2, 0, 0, 1, 1, True),
        (3, 2, 1, 1, 1, 4, True),
        (4, 2, 1, 0, 1, 2, False),
        (3, 1, 1, 0, 1, 1, True),
        (2, 3, 0, 2, 1, 1, True),
        (3, 2, 2, 1, 2, 2, True),
        (5, 2, 3, 0, 1, 1, False),
        ((3, 4), (2, 1), (1, 0), (1, 0), 1, 1, False),
    ],
)
def test_transposed_convolutions_are_exact(
    kernel: Any,
    stride: Any,
    padding: Any,
    extra: Any,
    dilation: int,
    groups: int,
    norm: bool,
    per_channel: bool,
    method: str,
) -> None:
    torch.manual_seed(0)
    arguments = (kernel, stride, padding, extra, groups, not norm, dilation)
    layer = nn.ConvTranspose2d(8, 12, *arguments)
    model = randomise_norms(
        Unit(nn.Sequential(layer, nn.BatchNorm2d(12) if norm else nn.ReLU()), 12)
    )
    weights = TensorSpec(method=method, per_channel=per_channel)
    activations = TensorSpec(method=method, bits=8)
    student = student_of(model, QuantSpec(weights=weights, activations=activations))
    graph = lower(student)
    batch = images(4, seed=5)
    seen: dict[str, Tensor] = {}
    name = "quant_middle_1"
    student.get_submodule(name).register_forward_hook(lambda m, i, o: seen.update(found=o))
    with torch.no_grad():
        student(batch)
    held = reference_executor.execute(graph, batch.numpy())
    assert any(isinstance(n, ir.Conv) and n.name == "middle.0" for n in graph.nodes)
    values = [v for n, v in graph.values.items() if n.startswith(name) and v.grid is not None]
    grid, last = values[-1].grid, values[-1].name
    assert grid is not None
    found = (held[last] - grid.zero_point) * np.float64(grid.scale)  # type: ignore[operator]
    wanted = seen["found"].double().numpy()
    assert wanted.std() > 2 * grid.scale
    wrong = np.abs(found - wanted) > 0.5 * grid.scale
    assert found.shape == wanted.shape
    assert wrong.mean() < 1e-3  # float noise at rounding boundaries


def test_an_excluded_transposed_convolution_stays_in_float(tmp_path: Path) -> None:
    student = student_of(made("transposed"), QuantSpec(exclude=("middle.0",)))
    report = verify(export(student, tmp_path / "m.onnx"), student, images(64, seed=5))
    assert max(stage.max_error for stage in report.stages) <= FEW_STEPS
    assert [f.node for f in report.coverage.fallbacks] == ["stem.0", "middle.0"]


# -- refusals ---------------------------------------------------------------------------------


class Bare(nn.Module):
    """Something done with a parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *sizes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.ones(sizes))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x), self.weight).flatten(1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bare(lambda x, w: torch.cat([x, w], 1), 2, 1, 8, 8), "runs on 2 images and not on 3"),
        (Bare(lambda x, w: torch.cat([x, w.relu().expand_as(x)], 1), 1), "no integer form|bare"),
        (Bare(lambda x, w: torch.matmul(w, x), 8, 8), r"only the product of two computed tensors"),
        (Bare(lambda x, w: x.softmax(0), 1), "wanted one axis, not that of the batch, got 0"),
        (
            Bare(lambda x, w: F.layer_norm(x, (8,), x.mean([2, 3]).sum(0)), 1),
            "wanted parameters as weight|sum",
        ),
    ],
)
def test_forms_without_a_meaning_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        quantize(model, example=SHAPE)


def test_an_opset_that_lacks_the_operator_is_refused(tmp_path: Path) -> None:
    options = ExportOptions(opset=17)
    message = "node 'middle': GELU needs opset 20, got 17; leave the opset out"
    with pytest.raises(ExportError, match=message):
        export(unit("gelu"), tmp_path / "m.onnx", options=options)


# -- families of torchvision ------------------------------------------------------------------

RELU_FAMILIES = {
    "resnet18": 64,
    "resnet50": 64,
    "mobilenet_v2": 64,
    "mnasnet1_0": 64,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet": 64,
    "regnet_y_400mf": 64,
    "vgg11": 224,  # at other sizes its adaptive pool has windows of different sizes
}
OTHER_FAMILIES = {"mobilenet_v3_small": 64, "efficientnet_b0": 64, "convnext_tiny": 64}
OTHER_FAMILIES["vit_b_16"] = 32

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "vit_b_16": {"image_size": 32},
}

# At 7 bits the graph is that of 4: every convolution's input is requantised.
SEVEN_BITS = QuantSpec(activations=TensorSpec(bits=7))

# Untrained networks amplify float32's rounding, each by another amount: ResNet-50 in PyTorch by
# several steps of its logits, where the sums alone are float64. So logits are held to what the
# student does to itself, and each layer, on the runtime's own codes, to rounding.
AMPLIFIED = 3.0
ONE_STEP = 1.0
RARE = 1e-4  # share of codes that lie so close to a border that rounding moves them
NEAR = 1e-3  # how close (steps); measured: 5e-5


def family(name: str, size: int) -> tuple[torch.fx.GraphModule, Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    build = getattr(torchvision.models, name)
    model = build(num_classes=10, **_ARGUMENTS.get(name, {})).eval()
    if name.startswith("vit"):  # torchvision begins with zeros, and logits that are all alike
        nn.init.normal_(model.heads.head.weight, std=0.1)
    coarse = torch.randn(4 if size > 64 else 16, 3, 8, 8)
    batch = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    reestimate_batch_norm(model, batch)
    student = quantize(model, SEVEN_BITS, example=(3, size, size))
    calibrate(student, batch)
    reestimate_batch_norm(student, batch)
    snap_biases(student)
    return student, batch


def layers_of(student: torch.fx.GraphModule) -> dict[str, int]:
    """Calls of convolutions, linear layers and products, and what lowering makes of affine maps."""
    calls = [n for n in student.graph.nodes if n.op == "call_module"]
    modules = [student.get_submodule(str(n.target)) for n in calls]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in modules)
    alone = sum(isinstance(n, ir.Conv) for n in lower(student).nodes) - convolutions
    assert alone >= 0
    return {
        "Conv": convolutions + alone,
        "Gemm": sum(isinstance(m, nn.Linear) for m in modules),
        "MatMul": sum(n.target is torch.matmul for n in student.graph.nodes),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RELU_FAMILIES, *OTHER_FAMILIES])
def test_families_run_in_integers(name: str, tmp_path: Path) -> None:
    size = (RELU_FAMILIES | OTHER_FAMILIES)[name]
    student, batch = family(name, size)
    path = export(student, tmp_path / "model.onnx").path
    report = verify(path, student, batch)
    exact = predict(in_integers(student), [batch])
    own = float(np.abs(exact - predict(student, [batch])).mean()) / report.output_step
    for stage in report.stages:
        assert stage.mean_error <= AMPLIFIED * own + ONE_STEP
    for optimize in (False, True):
        few = batch[:2].numpy()
        isolated = isolate(student, QdqFile(path), OnnxRuntime(), few, optimize)
        assert isolated.worst is not None
        assert isolated.worst.outside <= NEAR
        assert isolated.unseen == ()
        assert isolated.largest <= 1
        assert isolated.differing <= RARE * isolated.codes
    coverage = report.coverage
    layers = layers_of(student)
    assert {kind: coverage.integer.get(kind, 0) for kind in layers} == layers
    assert {kind: coverage.total.get(kind, 0) for kind in layers} == layers
    assert (layers["MatMul"] > 0) == name.startswith("vit")
    if name in RELU_FAMILIES:
        assert coverage.fallbacks == ()
        assert coverage.integer == coverage.total
    else:
        assert coverage.fallbacks
        assert all("rule" in fallback.reason for fallback in coverage.fallbacks)


class _Branches(nn.Module):
    """Two activations of other bounds, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.hardtanh(self.right(x), 0.0, 0.25)], 1)
        return self.classifier(x.mean([2, 3]))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_parts_of_a_concatenation_have_bounds_of_their_own(target: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    torch.manual_seed(0)
    student = student_of(_Branches(), exact_here(QuantSpec(target=target)))
    artifact = export(student, tmp_path / "model.onnx")
    assert verify(artifact, student, images(8)).constants == ()

"""A student in its integers' arithmetic: an independent reference, and ONNX Runtime itself."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import CLASSES, NETWORKS, SHAPE, images, network, randomise_norms
from sqakd_exporters.onnxruntime import OnnxRuntime
from torch import Tensor, nn

import sqakd_deploy.lowering.exact as module
from sqakd_deploy import graph as ir
from sqakd_deploy.api import export
from sqakd_deploy.errors import ExportError, ModelError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.lowering.borders import settle
from sqakd_deploy.lowering.exact import as_deployed, in_integers, step_behind
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.student import record
from sqakd_deploy.verification.taps import read_codes


class Upsampled(nn.Module):
    """A transposed convolution, squeeze-and-excite, a sum of broadcast tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.squeeze = nn.Conv2d(6, 6, 1)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.stem(x))).relu()
        x = x * torch.sigmoid(self.squeeze(x.mean([2, 3], keepdim=True)))
        return self.classifier((x + x.mean([2, 3], keepdim=True)).mean([2, 3]))


class Twice(nn.Module):
    """One convolution called twice, once with a BatchNorm of either sign behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu())).relu()
        x = torch.cat([torch.cat([self.conv(x), x], 1), x], 1)
        return self.classifier(x[:, 4:12].mean([2, 3]))


class Rows(nn.Module):
    """A linear layer on the channels of every position, with a BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.rows = nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(64)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows(self.stem(x).relu().permute(0, 2, 3, 1)).relu()
        return self.classifier(self.norm(x.flatten(1, 2)).mean(1))


class Scaled(nn.Module):
    """A factor for each channel of codes, which lowering makes a layer of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gamma = nn.Parameter(torch.randn(8, 1, 1))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.gamma * self.conv(x)
        return self.classifier((self.gamma * x).mean([2, 3]))


class Products(nn.Module):
    """Matrix products of codes: of two tensors, of one and itself, through a factor and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.queries, self.keys = nn.Linear(8, 8), nn.Linear(8, 8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu().flatten(2).transpose(1, 2)
        weights = (self.queries(x) @ self.keys(x).transpose(-2, -1) * 0.25).relu()
        x = torch.matmul(weights, x) / 64
        return self.classifier((x.transpose(-2, -1) @ x).mean(1))


OTHERS: dict[str, type[nn.Module]] = {
    "products": Products,
    "upsampled": Upsampled,
    "twice": Twice,
    "rows": Rows,
    "scaled": Scaled,
}
ALL = {**NETWORKS, **OTHERS}


def spec(bits: int, method: str = "lsq", per_channel: bool = False) -> QuantSpec:
    weights = TensorSpec(bits=bits, method=method, per_channel=per_channel)
    return QuantSpec(weights=weights, activations=TensorSpec(bits=bits, method=method))


def finished(name: str, how: QuantSpec) -> Any:
    torch.manual_seed(0)
    model = network(name) if name in NETWORKS else randomise_norms(ALL[name]())
    student = quantize(model, how, example=SHAPE)
    calibrate(student, images())
    reestimate_batch_norm(student, images())
    settle(student)
    return student


# -- the reference: one layer in integers of any size and rationals ------------------------------


def rounded(value: Fraction) -> Fraction:
    """To float32, half to even, by the distance to its neighbours."""
    near = np.float32(float(value))
    around = [near, *(np.nextafter(near, np.float32(sign * np.inf)) for sign in (-1, 1))]
    odd = [int(candidate.view(np.int32)) & 1 for candidate in around]
    exact = [Fraction(float(candidate)) for candidate in around]
    return min(zip(exact, odd, strict=True), key=lambda c: (abs(c[0] - value), c[1]))[0]


def levels_of_layer(
    before: np.ndarray,
    node: ir.Linear,
    grid: ir.Grid,
    quantizer: ir.Quantize,
    target: ir.Grid,
) -> np.ndarray:
    """What a linear layer and the quantizer behind it make of levels ``(N, I)``."""
    assert isinstance(node.weight, ir.IntWeight)
    assert isinstance(node.bias, ir.IntBias)
    low, high = target.qmin - target.zero_point, target.qmax - target.zero_point
    found = np.zeros((len(before), len(node.weight.scale)), int)
    for o, row in enumerate(node.weight.codes):
        scales = Fraction(float(grid.scale)) * Fraction(float(node.weight.scale[o]))
        ratio = rounded(rounded(scales) / Fraction(float(quantizer.step)))
        for n, levels in enumerate(before):
            total = sum(int(a) * int(b) for a, b in zip(levels, row, strict=True))
            scaled = rounded(rounded(Fraction(total + int(node.bias.codes[o]))) * ratio)
            found[n, o] = min(max(round(scaled), low), high)  # half to even
    return found


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_layer_is_what_its_integers_are(bits: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Linear(12, CLASSES))
    student = quantize(model, spec(bits), example=SHAPE)
    calibrate(student, images())
    graph = lower(student)
    layers = [n for n in graph.nodes if isinstance(n, ir.Linear)]
    quantizers = {n.inputs[0]: n for n in graph.nodes if isinstance(n, ir.Quantize)}
    recorded = record(student, images(16).numpy())
    for node in layers:
        quantizer = quantizers[node.output]
        source, target = (graph.values[v].grid for v in (node.inputs[0], quantizer.output))
        assert source is not None
        assert target is not None
        before = recorded[next(q.name for q in quantizers.values()
            if graph.values[q.output].grid == source)]  # fmt: skip
        levels = before.codes.reshape(16, -1).astype(int) - before.zero_point
        wanted = levels_of_layer(levels, node, source, quantizer, target)
        own = recorded[quantizer.name]
        np.testing.assert_array_equal(own.codes.astype(int) - own.zero_point, wanted)


# -- the runtime ---------------------------------------------------------------------------------


def assert_the_same(student: Any, folder: Path, sample: Tensor) -> None:
    """Every code of every tensor, and every logit, bit for bit."""
    path = export(student, folder / "model.onnx").path
    runtime, file = OnnxRuntime(), QdqFile(path)
    logits = predict(in_integers(student), [sample])
    np.testing.assert_array_equal(runtime.open(path).run(sample.numpy()), logits)
    own = record(student, sample.numpy())
    shapes = {name: own[name].codes.shape[1:] for name in own if name in file.quantized}
    assert len(shapes) == len(own)
    seen = read_codes(file, runtime, sample.numpy(), shapes, optimize=True)
    assert not seen.unseen
    for name, codes in seen.codes.items():
        theirs = codes.astype(int) - file.quantized[name].zero_point
        np.testing.assert_array_equal(theirs, own[name].codes.astype(int) - own[name].zero_point)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("name", ALL)
def test_onnxruntime_answers_bit_for_bit(name: str, bits: int, tmp_path: Path) -> None:
    assert_the_same(
        finished(name, spec(bits, per_channel=bits == 4)), tmp_path, images(256, seed=3)
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lsq"])
@pytest.mark.parametrize("bits", [4, 1])
def test_whatever_the_method(method: str, bits: int, tmp_path: Path) -> None:
    for name in ("residual", "mixed", "twice"):
        assert_the_same(finished(name, spec(bits, method)), tmp_path, images(256, seed=3))


def test_a_simulation_is_not_so_exact(tmp_path: Path) -> None:
    """What this is for: float32 sums put some codes on the other side of a border."""
    student = finished("residual", spec(8))
    sample = images(4096, seed=3)
    path = export(student, tmp_path / "model.onnx").path
    theirs = OnnxRuntime().open(path).run(sample.numpy())
    np.testing.assert_array_equal(predict(in_integers(student), [sample]), theirs)
    assert (predict(student, [sample]) != theirs).any()


# -- what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_sums_are_exact_in_either_type(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = finished(name, spec(4))
    narrow = in_integers(student)
    monkeypatch.setattr(module, "_float32_sums_as_written", lambda device: False)
    wide = in_integers(student)
    kinds = [{m.dtype for m in exact.modules() if isinstance(m, module._IntegerLayer)}
        for exact in (narrow, wide)]  # fmt: skip
    assert torch.float32 in kinds[0]
    assert kinds[1] == {torch.float64}
    sample = images(64, seed=5)
    assert torch.equal(narrow(sample), wide(sample))


@pytest.mark.parametrize("inputs", [500, 600])
def test_sums_beyond_float32_are_not_summed_in_it(inputs: int) -> None:
    grid = ir.Grid(np.float32(1.0), 0, 0, 255)
    codes = np.full((1, inputs), 127, np.int8)
    weight = ir.IntWeight(codes, np.ones(1, np.float32), 8, False)
    layer = module._IntegerLayer(nn.Linear(inputs, 1, bias=False), weight, None, grid, None)
    largest = 127 * 255 * inputs
    assert (layer.dtype is torch.float64) == (largest >= 2**24)
    levels = torch.full((1, inputs), 255.0)
    levels[0, 0] = 254.0  # of 600: a number of 25 bits that float32 does not hold, rounded once
    with torch.no_grad():
        assert float(layer(levels.double())) == float(np.float32(largest - 127))


def test_the_student_stays_as_it_is() -> None:
    student = finished("residual", spec(4))
    student.train()
    before = copy.deepcopy(student.state_dict())
    exact = in_integers(student)
    assert student.training
    assert not exact.training
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    answer = exact(images(3))
    assert answer.dtype == torch.float32
    assert answer.shape == (3, CLASSES)
    torch.testing.assert_close(answer, student.eval()(images(3)), rtol=0, atol=float("inf"))


def test_a_layer_with_several_quantizers_behind_it_has_no_step() -> None:
    graph = lower(finished("mixed", spec(4)))
    pooled = {n.inputs[0] for n in graph.nodes if isinstance(n, ir.Quantize)}
    stem = next(n for n in graph.nodes if isinstance(n, ir.Conv))
    assert stem.output in pooled or step_behind(graph, stem.output) is not None
    assert step_behind(graph, graph.output) is None
    assert step_behind(graph, graph.input) is not None


class Cast(nn.Module):
    """Turns what it computes into float32, as models written for half precision do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean([2, 3])
        x = self.norm(x.float()).to(torch.float32)
        return self.classifier(x)


def test_models_that_ask_for_float32() -> None:
    torch.manual_seed(0)
    student = quantize(Cast().eval(), spec(4), example=SHAPE)
    calibrate(student, images())
    torch.testing.assert_close(
        in_integers(student)(images(8)), student(images(8)), rtol=0, atol=0.2
    )


def test_refusals() -> None:
    with pytest.raises(ModelError):
        in_integers(nn.Linear(2, 2))
    with pytest.raises(ExportError, match="never calibrated"):
        in_integers(quantize(network("residual"), spec(4), example=SHAPE))


def test_what_has_no_integers_answers_as_it_is() -> None:
    formless = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.CELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    student = quantize(formless.eval(), QuantSpec(exclude=("1",)), example=SHAPE)
    calibrate(student, images())
    assert as_deployed(student) is student
    with pytest.raises(ExportError, match="CELU"):
        in_integers(student)
    student = finished("residual", spec(4))
    assert torch.equal(as_deployed(student)(images(2)), in_integers(student)(images(2)))

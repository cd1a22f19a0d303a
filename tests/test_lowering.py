"""Networks whose lowering once lost something: each file must answer as its student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, exact_here, images
from test_families import FEW_STEPS, RARELY, with_spread
from test_lifting import Net, Tokens
from torch import Tensor, nn

from sqakd_deploy.api import export, verify
from sqakd_deploy.errors import ModelError
from sqakd_deploy.quantization import activation_quantizers, quantize, weight_quantizers
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.distillation import distill

CALIBRATED = DistillConfig(epochs=0, calibration_images=64, bn_images=64)


class Inner(nn.Module):
    """Code of one's own over some layers."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.code = code
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def conv(size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, size, padding=size // 2, **settings)


def excluded_block() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        return F.relu(net.second(F.relu(net.norm(net.first(x)))) + x)

    return Net(Inner(code, first=conv(bias=False), norm=nn.BatchNorm2d(8), second=conv()))


def norm_behind_rows() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        return F.relu(net.norm(net.linear(x)))

    return Net(nn.AvgPool2d(2), conv(), Inner(code, linear=nn.Linear(4, 8), norm=nn.BatchNorm2d(8)))


def plain_norm() -> nn.Module:
    return Net(conv(1, groups=8, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(), conv())


def one_bias() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, net.first, net.bias, padding=1).relu()
        return F.conv2d(x, net.second, net.bias, padding=1)

    weights = {name: nn.Parameter(torch.randn(8, 8, 3, 3)) for name in ("first", "second")}
    return Net(Inner(code, **weights, bias=nn.Parameter(torch.randn(8))))


def tied_by_hand() -> nn.Module:
    first, second = conv(), conv()
    second.bias = first.bias
    return Net(first, nn.ReLU(), second)


def named_as_an_operator() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        return net.add(net.add(x).relu() + x) + x

    return Net(Inner(code, add=conv()))


def rows_read_twice() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        y = net.linear(x)
        return y + net.dropout(y)

    return Net(Tokens(Inner(code, linear=nn.Linear(8, 8), dropout=nn.Dropout(0.1))))


def pixels_read_twice() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        y = net.up(x)
        return y + net.dropout(y)

    return Net(Inner(code, up=nn.ConvTranspose2d(8, 8, 2, 2), dropout=nn.Dropout(0.1)))


def gated_rows() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        value, gate = net.linear(x).chunk(2, -1)
        return value * gate.sigmoid()

    return Net(Tokens(Inner(code, linear=nn.Linear(8, 16))))


def cut_token() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        first, second = x.flatten(2).transpose(1, 2)[:, 3].split(4, -1)
        return torch.cat([second, first], -1)[..., None, None]

    return Net(Inner(code), conv(1))


def cut_pixels() -> nn.Module:
    def code(net: Any, x: Tensor) -> Tensor:
        first, second = net.up(x).chunk(2, 1)
        return first + second

    return Net(Inner(code, up=nn.ConvTranspose2d(8, 16, 2, 2)), conv(1))


TWO = TensorSpec(bits=2)
CASES: dict[str, tuple[Callable[[], nn.Module], QuantSpec]] = {
    "excluded_block": (excluded_block, QuantSpec(exclude=("inner.0.first",))),
    "norm_behind_rows": (norm_behind_rows, QuantSpec()),
    "plain_norm": (plain_norm, QuantSpec(weights=TWO, activations=TWO)),
    "one_bias": (one_bias, QuantSpec()),
    "tied_by_hand": (tied_by_hand, QuantSpec()),
    "named_as_an_operator": (named_as_an_operator, QuantSpec()),
    "rows_read_twice": (rows_read_twice, QuantSpec(placement="paper")),
    "pixels_read_twice": (pixels_read_twice, QuantSpec(placement="paper")),
    "gated_rows": (gated_rows, QuantSpec(placement="paper")),
    "cut_token": (cut_token, QuantSpec()),
    "cut_pixels": (cut_pixels, QuantSpec(placement="paper")),
}


def made(name: str) -> tuple[nn.Module, QuantSpec]:
    torch.manual_seed(0)
    build, spec = CASES[name]
    return with_spread(build()).eval(), spec


@pytest.mark.parametrize("name", CASES)
def test_the_file_answers_as_the_student(name: str, tmp_path: Path) -> None:
    model, spec = made(name)
    student = quantize(model, spec, example=SHAPE)
    distill(student, images(64), teacher=model, config=CALIBRATED)
    report = verify(export(student, tmp_path / "model.onnx"), student, images(128, seed=5))
    assert not report.failures
    with torch.no_grad():
        assert float(student(images(128)).std(0).max()) > 5 * report.output_step
    for stage in report.stages:
        assert stage.mean_error < RARELY, report
        assert stage.max_error <= FEW_STEPS, report
    floats = [f.node for f in report.coverage.fallbacks if f.op_type == "Conv"]
    if spec.placement == "target":
        assert floats == (["inner.0.first"] if spec.exclude else [])


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "qonnx"])
@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(16)], ids=["plain", "norm"])
def test_means_side_by_side_are_integers(norm: nn.Module, target: str, tmp_path: Path) -> None:
    """Each is rounded right behind it, not behind the reshape to a vector."""
    pytest.importorskip(target)

    def code(net: Any, x: Tensor) -> Tensor:
        first, second = F.relu(net.first(x)), F.relu(net.second(x))
        both = torch.cat([first.mean((2, 3)), second.mean((2, 3))], 1)
        return net.head(net.norm(both))

    torch.manual_seed(0)
    parts = {"first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(3, 8, 3, 2), "norm": norm}
    model = with_spread(Inner(code, **parts, head=nn.Linear(16, 5))).eval()
    student = quantize(model, exact_here(QuantSpec(target=target)), example=SHAPE)
    distill(student, images(64), teacher=model, config=CALIBRATED)
    report = verify(export(student, tmp_path / "model.onnx"), student, images(64, seed=5))
    assert not report.failures
    assert report.coverage.fallbacks == ()
    assert report.coverage.integer["GlobalAveragePool"] == 2
    assert all(stage.max_error <= FEW_STEPS for stage in report.stages)


def test_an_exclusion_holds_for_every_call_of_a_layer() -> None:
    torch.manual_seed(0)
    model = Net(Inner(lambda net, x: net.add(net.add(x).relu()), add=conv())).eval()
    student = quantize(model, QuantSpec(exclude=("inner.0.add",)), example=SHAPE)
    assert not any("add" in name for name in weight_quantizers(student))


def test_another_tensors_type_is_no_reading_of_it() -> None:
    torch.manual_seed(0)
    code = Inner(
        lambda net, x: net.second(net.first(x).relu().type_as(x)), first=conv(), second=conv()
    )
    student = quantize(Net(code).eval(), example=SHAPE)
    assert {q.bits for n, q in activation_quantizers(student).items() if "relu" in n} == {4}


def test_a_sequences_convolution_called_twice_is_one() -> None:
    torch.manual_seed(0)

    def code(net: Any, x: Tensor) -> Tensor:
        return net.along(net.along(x.flatten(2)).relu()).unflatten(2, x.shape[2:])

    model = Net(Inner(code, along=nn.Conv1d(8, 8, 3, padding=1))).eval()
    student = quantize(model, example=SHAPE)
    first, second = (student.get_submodule(f"inner.0.{name}") for name in ("along", "along_2"))
    assert first.weight is second.weight
    quantize(model, QuantSpec(exclude=("inner.0.along",)), example=SHAPE)


def test_a_parameter_for_each_window_is_refused() -> None:
    torch.manual_seed(0)

    def code(net: Any, x: Tensor) -> Tensor:
        windows = x.flatten(2).reshape(-1, 16, 8)
        tokens = torch.cat((net.token.expand(windows.shape[0], -1, -1), windows), 1)
        return net.linear(tokens)[:, 1:].reshape(x.shape)

    token = nn.Parameter(torch.randn(1, 1, 8))
    model = Net(Inner(code, token=token, linear=nn.Linear(8, 8))).eval()
    with pytest.raises(ModelError, match="a parameter repeated for parts of images"):
        quantize(model, example=SHAPE)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.MaxPool2d])
def test_a_hook_of_a_layer_without_weights_is_refused(kind: Callable[..., nn.Module]) -> None:
    layer = kind(2) if kind is nn.MaxPool2d else kind()
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ModelError, match="forward hooks, which a file cannot have"):
        quantize(Net(conv(), layer).eval(), example=SHAPE)


def test_what_is_shared_by_hand_stays_shared_in_the_model() -> None:
    model, spec = made("tied_by_hand")
    before = copy.deepcopy(model.state_dict())
    quantize(model, spec, example=SHAPE)
    assert model.inner[0].bias is model.inner[2].bias
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model(images(2)).shape[0] == 2


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "openvino", "qonnx"])
def test_a_pool_in_ceil_mode_has_the_windows_that_torch_has(
    kind: Callable[..., nn.Module], target: str, tmp_path: Path
) -> None:
    """torch drops a last window that would begin in the padding."""
    if target in ("openvino", "qonnx"):
        pytest.importorskip(target)
    torch.manual_seed(0)
    pool = kind(2, 2, padding=1, ceil_mode=True)
    model = with_spread(Net(nn.Conv2d(8, 8, 4), nn.ReLU(), pool, conv())).eval()
    student = quantize(model, QuantSpec(target=target), example=SHAPE)
    distill(student, images(64), teacher=model, config=CALIBRATED)
    with torch.no_grad():
        assert model.inner[:3](torch.zeros(1, 8, 8, 8)).shape[-1] == 3
    report = verify(export(student, tmp_path / "model.onnx"), student, images(64, seed=5))
    assert not report.failures
    for stage in report.stages:
        assert stage.max_error <= FEW_STEPS, report

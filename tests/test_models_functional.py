"""Functional code as people write it: each pattern runs as its student does, or is refused by name.

One small network a pattern: quantised at 4 bits, calibrated on random images, exported, and run in
ONNX Runtime with its optimisations off and on.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import CLASSES, SHAPE, images, randomise_norms
from torch import Tensor, nn

from sqakd_deploy.api import export_proven
from sqakd_deploy.checkpoint import load_weights, save_weights
from sqakd_deploy.errors import ModelError
from sqakd_deploy.exporting import Coverage
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.tracing.trace import trace
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.saturation import saturation_of

CALIBRATED = DistillConfig(epochs=0, calibration_images=64, bn_images=64)

# Kernels of a runtime round half-way values differently in a few codes, each of which can move the
# logits by single steps (docs/runtime-rules.md, rule 20). A wrong operator moves them by dozens.
FEW_STEPS = 8
RARELY = 0.2


class Net(nn.Module):
    """Two branches from one stem, what is under test, and a classifier.

    Args:
        join: from the module, the stem's tensor and a branch's, both ``(N, 8, 8, 8)``, to a tensor
            ``(N, C, H, W)`` or to a vector ``(N, F)``.
    """

    def __init__(self, join: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1)), nn.Identity(), nn.ReLU())
            for _ in range(2)
        )
        self.dropout = nn.Dropout(0.3)
        self.join = join
        with torch.no_grad():
            features = self.eval().features(torch.zeros(2, *SHAPE))
        if features.dim() == 4:
            self.head: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        else:
            self.head = nn.Identity()
        self.classifier = nn.Linear(features.shape[1], CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        return self.join(self, x, self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.head(self.features(x)))
        return logits


def _shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


def _inplace_statement(net: Any, x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    F.relu(z, inplace=True)
    return z


def _inplace_method_statement(net: Any, x: Tensor, y: Tensor) -> Tensor:
    y.relu_()
    y.add_(x)
    return y


def _overwritten(net: Any, x: Tensor, y: Tensor) -> Tensor:
    z = net.relu(y)  # in place: y changes too
    return net.shared(z) + y


def _iadd(net: Any, x: Tensor, y: Tensor) -> Tensor:
    y += x
    return F.relu(y)


def _blocks(net: Any, x: Tensor, y: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x)
    return x + y


def _split(net: Any, x: Tensor, y: Tensor) -> Tensor:
    few, many = torch.split(y, [2, 6], dim=1)
    return torch.cat((many, few), 1)


def _half(net: Any, x: Tensor, y: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], y[:, half:]], dim=1)


PATTERNS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    # sums
    "x + y": lambda net, x, y: F.relu(x + y),
    "torch.add": lambda net, x, y: torch.add(x, y),
    "torch.add by name": lambda net, x, y: torch.add(x, other=y, alpha=1),
    "x.add": lambda net, x, y: x.add(y).relu(),
    "x.add_": lambda net, x, y: y.add_(x),
    "y += x": _iadd,
    "operator.iadd": lambda net, x, y: operator.iadd(y, x),
    "x + x": lambda net, x, y: y + y,
    "sum of a list": lambda net, x, y: sum([x, y, net.shared(x)]),  # type: ignore[return-value]
    # concatenations
    "torch.cat of a tuple": lambda net, x, y: torch.cat((x, y), dim=1),
    "torch.cat of a list": lambda net, x, y: torch.cat([x, F.relu(y)], 1),
    "torch.cat from the end": lambda net, x, y: torch.cat([x, y], dim=-3),
    "torch.concat": lambda net, x, y: torch.concat([y, x], axis=1),  # type: ignore[call-overload]
    "torch.cat of one tensor twice": lambda net, x, y: torch.cat([y, x, y], dim=1),
    # activations
    "F.relu": lambda net, x, y: F.relu(y),
    "F.relu in place": lambda net, x, y: F.relu(y, inplace=True),
    "F.relu in place by position": lambda net, x, y: F.relu(y, True),
    "x.relu": lambda net, x, y: y.relu(),
    "x.relu_": lambda net, x, y: y.relu_(),
    "torch.relu": lambda net, x, y: torch.relu(y),
    "torch.relu_": lambda net, x, y: torch.relu_(y),
    "F.relu6": lambda net, x, y: F.relu6(y, inplace=True),
    "F.hardtanh": lambda net, x, y: F.hardtanh(y, 0.0, 1.5),
    "torch.clamp": lambda net, x, y: torch.clamp(y, min=0),
    "x.clamp": lambda net, x, y: y.clamp(0, 6),
    "x.clamp_": lambda net, x, y: y.clamp_(0.0, 2.0),
    "relu twice": lambda net, x, y: F.relu(F.relu(x + y)),
    "relu of a slice": lambda net, x, y: F.relu(y[:, 2:6]),
    "in place, as a statement": _inplace_statement,
    "in place, as a method's statement": _inplace_method_statement,
    "in place, the argument read later": _overwritten,
    # vectors
    "torch.flatten": lambda net, x, y: torch.flatten(y, 1),
    "torch.flatten by names": lambda net, x, y: torch.flatten(y, start_dim=1, end_dim=-1),
    "x.flatten": lambda net, x, y: y.flatten(1),
    "x.view(x.size(0), -1)": lambda net, x, y: y.view(y.size(0), -1),
    "x.view(-1, F)": lambda net, x, y: F.adaptive_avg_pool2d(y, 1).view(-1, 8),
    "x.reshape(x.shape[0], -1)": lambda net, x, y: y.reshape(y.shape[0], -1),
    "torch.reshape": lambda net, x, y: torch.reshape(y, (y.size()[0], -1)),
    "x.squeeze": lambda net, x, y: F.adaptive_avg_pool2d(y, (1, 1)).squeeze(-1).squeeze(-1),
    "torch.squeeze": lambda net, x, y: torch.squeeze(F.adaptive_avg_pool2d(F.relu(y), 1)),
    "unsqueeze": lambda net, x, y: y.mean((2, 3)).unsqueeze(-1).unsqueeze(-1),
    # means and pools
    "x.mean": lambda net, x, y: y.mean((2, 3)),
    "x.mean in two steps' order": lambda net, x, y: y.mean([3, 2]),
    "x.mean, axes kept": lambda net, x, y: y.mean([-2, -1], keepdim=True),
    "torch.mean": lambda net, x, y: torch.mean(F.relu(y), dim=(2, 3)),
    "F.adaptive_avg_pool2d": lambda net, x, y: F.adaptive_avg_pool2d(y, (2, 2)),
    "F.adaptive_avg_pool2d of all": lambda net, x, y: F.adaptive_avg_pool2d(y, (None, 4)),
    "F.avg_pool2d": lambda net, x, y: F.avg_pool2d(F.relu(y), 3, 2, 1),
    "F.avg_pool2d of a computed size": lambda net, x, y: F.avg_pool2d(y, y.size()[3]),
    "F.avg_pool2d of a computed pair": lambda net, x, y: F.avg_pool2d(y, y.size()[2:]),
    "F.max_pool2d": lambda net, x, y: F.max_pool2d(y, 3, stride=2, padding=1),
    "torch.max_pool2d": lambda net, x, y: torch.max_pool2d(y, 2),
    # data movement
    "option A": lambda net, x, y: F.pad((x + y)[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0),
    "option A with an ellipsis": lambda net, x, y: F.pad(y[..., ::2, 1::2], (0, 0, 0, 0, 2, 2)),
    "slices by a computed size": _half,
    "slices from the end": lambda net, x, y: y[:, -4:, :-1, 1:-1],
    "x.chunk": lambda net, x, y: y.chunk(2, dim=1)[1] + x.chunk(2, dim=1)[0],
    "torch.chunk": lambda net, x, y: torch.cat([torch.chunk(y, 4, 1)[i] for i in (0, -1)], 1),
    "torch.split": _split,
    "x.split": lambda net, x, y: y.split(x.size(1) // 2, 1)[1],
    "channel shuffle": lambda net, x, y: net.blocks[0](_shuffle(torch.cat((x, y), 1)[:, 4:12])),
    "x.permute": lambda net, x, y: y.permute(0, 1, 3, 2),
    "permute to the end and back": lambda net, x, y: y.permute(0, 2, 3, 1).permute((0, 3, 1, 2)),
    # what does nothing at deployment
    "F.dropout": lambda net, x, y: F.dropout(y, 0.5, training=net.training),
    "F.dropout2d": lambda net, x, y: F.dropout2d(y, p=0.2, training=net.training),
    "nn.Dropout": lambda net, x, y: net.dropout(y.contiguous()),
    # modules
    "blocks of a list": _blocks,
    # concatenations of concatenations
    "torch.cat of a torch.cat": lambda net, x, y: torch.cat(
        [torch.cat([net.shared(x), F.relu(y)], 1), F.relu(net.conv(x))], 1
    ),
    "torch.cat of one activation twice": lambda net, x, y: torch.cat([F.relu(y), F.relu(y)], 1),
    "torch.cat of a tensor and itself": lambda net, x, y: torch.cat([z := F.relu(y), z], 1),
    "torch.concatenate": lambda net, x, y: torch.concatenate([y, x], 1),
    "x.swapaxes": lambda net, x, y: y.swapaxes(2, 3),
    "x.clamp_min": lambda net, x, y: y.float().clamp_min(0.0),
    "x.square": lambda net, x, y: y.relu() ** 2,
    # along axes
    "torch.stack": lambda net, x, y: torch.stack([x, y], 1).flatten(1, 2),
    "torch.stack of the last axis": lambda net, x, y: torch.stack([x, y], -1).flatten(3),
    "x.sum over groups": lambda net, x, y: y.unflatten(1, (2, 4)).sum(1),
    "torch.roll": lambda net, x, y: torch.roll(y, shifts=(-1, 3), dims=(2, 3)),
    "torch.roll of one axis": lambda net, x, y: torch.roll(y, (1,), 2),
    "torch.sum by names": lambda net, x, y: torch.sum(input=y.unflatten(1, (2, 4)), dim=1),
    "expanded and read again": lambda net, x, y: (
        x * (g := y.mean((2, 3), keepdim=True)).expand_as(x) + g.mean(1, keepdim=True)
    ),
    "x.roll": lambda net, x, y: y.roll(-2, 1),
    "x.mean, one axis after another": lambda net, x, y: y.mean(3).mean(2),
    "x.mean of pixels in a row": lambda net, x, y: y.flatten(2).mean(-1),
    "F.adaptive_max_pool2d": lambda net, x, y: F.adaptive_max_pool2d(y, (4, 2)),
    "F.adaptive_max_pool2d of all": lambda net, x, y: F.adaptive_max_pool2d(y, 1),
    "a sum that broadcasts": lambda net, x, y: x + y.mean((2, 3), keepdim=True),
    "torch.add that broadcasts": lambda net, x, y: torch.add(y.mean((2, 3), True), x).relu(),
    # pieces of what lowering holds in another shape
    "halves of vectors": lambda net, x, y: torch.cat(
        [y.flatten(2)[:, :, 5].chunk(2, 1)[i] for i in (1, 0)], 1
    ),
    # what does nothing
    "x.clone": lambda net, x, y: y.clone().detach().to(x.dtype).type_as(x) + 0.0,
    "x.clamp_min_": lambda net, x, y: y.clamp_min_(0.0),
    "new axes": lambda net, x, y: y[:, None, ..., :].squeeze(1) + x[:, :, 0, None, :],
}


def proven(net: nn.Module, path: Path) -> Coverage:
    reestimate_batch_norm(net, images(64))
    student = quantize(net, example=SHAPE)
    with torch.no_grad():
        assert torch.equal(trace(copy.deepcopy(net), SHAPE)(images()), net(images()))
    distill(student, images(64), teacher=net, config=CALIBRATED)
    _, report = export_proven(student, path / "model.onnx", images(256, seed=5))
    _, *stages = report.stages
    assert len(stages) == 2
    for stage in stages:
        assert stage.mean_error < RARELY, report
        assert stage.max_error <= FEW_STEPS, report
    assert report.failures == []
    assert len(saturation_of(QdqFile(path / "model.onnx"), "vnni").layers) >= 1
    return report.coverage


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_run_as_trained(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    coverage = proven(randomise_norms(Net(PATTERNS[name])), tmp_path)
    assert coverage.fallbacks == ()


def test_a_block_called_twice_has_a_bias_for_each_accumulator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = randomise_norms(Net(lambda net, x, y: net.shared(net.shared(x)) + y))
    assert proven(net, tmp_path).fallbacks == ()
    student = quantize(net, example=SHAPE)
    first, second = student.get_submodule("shared.0"), student.get_submodule("shared.0_2")
    assert first.weight is second.weight
    assert first.bias is not second.bias
    calibrate(student, images(64))
    trained = copy.deepcopy(student)
    distill(trained, images(64), teacher=net, config=DistillConfig(epochs=1, batch_size=16))
    save_weights(trained, tmp_path / "student.safetensors")
    load_weights(student, tmp_path / "student.safetensors")
    assert torch.equal(student.eval()(images()), trained.eval()(images()))


class Twice(nn.Module):
    """Its own ``conv_2`` has the name that conv's second call would get."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_2 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_2(self.conv(self.conv(x))).flatten(1)


def test_a_second_call_takes_the_name_of_no_other_layer() -> None:
    torch.manual_seed(0)
    net = Twice().eval()
    student = quantize(net, example=SHAPE)
    assert {"conv", "conv_2", "conv_3"} <= {name for name, _ in student.named_modules()}
    assert student.get_submodule("conv_2").weight is not student.get_submodule("conv").weight
    assert student.get_submodule("conv_3").weight is student.get_submodule("conv").weight


def test_a_clip_of_both_signs_is_right_but_may_stay_in_float(tmp_path: Path) -> None:
    """Its range and the quantizer's differ by less than a step; the report says what that costs."""
    torch.manual_seed(0)
    net = randomise_norms(Net(lambda net, x, y: F.hardtanh_(y)))
    (fallback,) = proven(net, tmp_path).fallbacks
    assert (fallback.node, fallback.op_type) == ("conv", "Conv")
    assert fallback.reason.endswith("(rule 3)")


@pytest.mark.parametrize(
    ("pattern", "operation"),
    [
        (lambda net, x, y: y.floor_(), "floor_"),
        (lambda net, x, y: torch.exp(y), "exp"),
        (lambda net, x, y: torch.cumsum(x, 1), "cumsum"),
        (lambda net, x, y: F.interpolate(x, scale_factor=2.0, mode="bicubic"), "interpolate"),
        (lambda net, x, y: torch.sign(y), "sign"),
    ],
)
def test_what_has_no_integer_form_is_refused_by_name_and_line(
    pattern: Callable[[Any, Tensor, Tensor], Tensor], operation: str
) -> None:
    with pytest.raises(ModelError) as caught:
        quantize(Net(pattern), example=SHAPE)
    line = pattern.__code__.co_firstlineno
    assert str(caught.value).startswith(
        f"operator '{operation}' (node '{operation}') at test_models_functional.py:{line} "
        "cannot be quantised: no integer form of it is known. "
    )


def test_windows_have_no_batch_of_their_own(tmp_path: Path) -> None:
    """A logit for each window is no answer for an image."""
    torch.manual_seed(0)
    net = Net(lambda net, x, y: y.reshape(-1, 8, 4, 8)).eval()
    with pytest.raises(ModelError, match="one row of logits for each image"):
        quantize(net, example=SHAPE)

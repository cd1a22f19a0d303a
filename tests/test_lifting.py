"""Models written as timm's are: layers as functions, computed constants, sizes in the code.

Each unit is exported and compared as any other model; what is asked here on top is that its layers
are found and trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import CLASSES, SHAPE, images
from test_families import FEW_STEPS, RARELY, same_in_numpy, with_spread
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from sqakd_deploy.api import export, verify
from sqakd_deploy.checkpoint import load_weights, save_weights
from sqakd_deploy.errors import ModelError
from sqakd_deploy.exporting import Coverage
from sqakd_deploy.quantization import (
    batch_norms,
    calibrate,
    quantize,
    weight_quantizers,
)
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.tracing.trace import trace
from sqakd_deploy.training.distillation import distill


class NormAct(nn.BatchNorm2d):
    """BatchNorm with its activation inside, as a function of its own attributes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input, got {x.ndim}D")
        training = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                         training, self.momentum or 0.0, self.eps)  # fmt: skip
        return self.act(x)


class Standardised(nn.Conv2d):
    """A convolution of standardised weights (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight) * 0.3
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Same(nn.Conv2d):
    """Padding as TensorFlow counts it: the rest of a division, the odd row below."""

    def forward(self, x: Tensor) -> Tensor:
        amounts: list[int] = []
        for size, kernel, stride in zip(x.size()[-2:], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            amounts = [total // 2, total - total // 2, *amounts]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride)


class Gained(nn.Module):
    """A branch with a gain a channel, held as a vector (LayerScale; Touvron et al., 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x).mul(self.gamma.reshape(1, -1, 1, 1))


class Attention(nn.Module):
    """One linear layer for query, key and value, unbound along an axis in front of the batch.

    Args:
        how: ``fused``, ``indexed`` or ``spelt``.
        biased: positions relative to each other, from a table.
    """

    def __init__(self, how: str, *, biased: bool = False) -> None:
        super().__init__()
        self.how, self.heads, self.width = how, 2, 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(7 * 7, 2)) if biased else None
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :] + 3).permute(1, 2, 0)
        self.register_buffer("index", apart[..., 0] * 7 + apart[..., 1])

    def bias(self) -> Tensor | None:
        if self.table is None:
            return None
        count = self.index.shape[0]
        bias = self.table[self.index.view(-1)].view(count, count, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        bias = self.bias() if attn_mask is None else attn_mask
        if self.how == "indexed":
            q, k, v = qkv[0], qkv[1], qkv[-1]
        else:
            q, k, v = qkv.unbind(0)
        if self.how == "spelt":
            scores = (q / math.sqrt(self.width)) @ k.transpose(-2, -1)
            x = (scores if bias is None else scores + bias).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.0,
                                               is_causal=is_causal)  # fmt: skip
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class Tokens(nn.Module):
    """Attention over the pixels of ``(N, 8, 4, 4)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pool, self.inner = nn.MaxPool2d(2), inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        size, shape = (x.shape[2], x.shape[3]), x.shape
        assert size == (4, 4), f"wanted 4×4 pixels, got {size}"
        y = x.flatten(2).transpose(1, 2)
        y = self.inner(y)
        return y.transpose(1, 2).reshape(shape) + x


class Net(nn.Module):
    """A stem, what is under test, and a classifier whose layers are functions."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = NormAct(8)
        self.inner = nn.Sequential(*inner)
        self.weight = nn.Parameter(torch.randn(CLASSES, 8))
        self.bias = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        if x.shape[-1] != x.shape[-2] or len(x.shape) != 4:
            raise ValueError(f"wanted square images, got {tuple(x.shape)}")
        x = self.inner(self.bn(self.stem(x))).mean((2, 3))
        if return_features:
            return x
        return F.linear(x, self.weight, self.bias)


UNITS: dict[str, Callable[[], nn.Module]] = {
    "norm_act": lambda: Net(nn.Conv2d(8, 8, 3, padding=1, bias=False), NormAct(8)),
    "standardised": lambda: Net(Standardised(8, 8, 3, padding=1), nn.ReLU()),
    "same": lambda: Net(Same(8, 8, 3, stride=2), NormAct(8), Same(8, 8, 2, stride=2)),
    "gained": lambda: Net(Gained(), nn.ReLU()),
    "fused": lambda: Net(Tokens(Attention("fused"))),
    "indexed": lambda: Net(Tokens(Attention("indexed"))),
    "spelt": lambda: Net(Tokens(Attention("spelt", biased=True))),
    "biased": lambda: Net(Tokens(Attention("fused", biased=True))),
    "difference": lambda: Net(Difference(), nn.ReLU()),
    "tokens": lambda: Net(Scaled()),
    "numbers": lambda: Net(Numbers(), nn.ReLU()),
    "encoder": lambda: Net(Tokens(encoder())),
    "encoder_norm_first": lambda: Net(
        Tokens(
            nn.TransformerEncoder(
                encoder(norm_first=True, activation="gelu"),
                2,
                nn.LayerNorm(8),
                enable_nested_tensor=False,
            )
        )
    ),
    "enlarged": lambda: Net(Enlarged(), nn.Conv2d(8, 8, 3), nn.ReLU()),
    "windows": lambda: Net(Windows(ShiftedWindowAttention)),
    "windows_of_cosines": lambda: Net(Windows(ShiftedWindowAttentionV2)),
    "windows_behind_each_other": lambda: Net(Strips()),
    "by_index": lambda: Net(Tokens(ByIndex())),
    "masked": lambda: Net(Tokens(Near())),
    "channel_attention": lambda: Net(ChannelAttention()),
    "split_attention": lambda: Net(SplitAttention()),
    "squashed": lambda: Net(nn.Conv2d(8, 8, 3), nn.Tanh()),
    "standardised_pixels": lambda: Net(Standard(), nn.Conv2d(8, 8, 3), nn.ReLU()),
    "group_norm": lambda: Net(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()),
    "group_norm_of_all": lambda: Net(nn.GroupNorm(1, 8), nn.Conv2d(8, 8, 3), nn.ReLU()),
    "instance_norm": lambda: Net(nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 8, 3)),
    "instance_norm_called": lambda: Net(InstanceNorm(), nn.Conv2d(8, 8, 3), nn.ReLU()),
}


class InstanceNorm(nn.Module):
    """As a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.instance_norm(x, eps=1e-3) + x)


class Windows(nn.Module):
    """Attention within windows that are moved by half their size (Swin; Liu et al., 2021)."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.attention = kind(8, [2, 2], [1, 1], 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(F.avg_pool2d(x, 2).permute(0, 2, 3, 1))
        return result.permute(0, 3, 1, 2)


class Strips(nn.Module):
    """Rows of pixels as images of their own (MobileViT; Mehta and Rastegari, 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, rows, columns = x.shape
        strips = x.permute(0, 2, 3, 1).reshape(batch * rows, columns, channels)
        y = self.norm(self.linear(strips).flatten(0, 1)).reshape_as(strips).relu()
        y = y.transpose(1, 2).reshape(batch, rows, channels, columns)
        return y.permute(0, 2, 1, 3) + x


class ByIndex(nn.Module):
    """Attention written with ``einsum``, its parts from ``chunk``."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.reshape(*part.shape[:2], 2, 4) for part in self.to_qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("n i h d, n j h d -> n h i j", q, k) / np.sqrt(4)
        return torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v).flatten(2)


class Near(nn.Module):
    """Attention to the tokens before each, by a mask of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("before", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 8)).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.before)


class ChannelAttention(nn.Module):
    """A gate for each channel from its neighbours (ECA; Wang et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1))
        return x * gate.view(x.shape[0], -1, 1, 1).sigmoid().expand_as(x)


class SplitAttention(nn.Module):
    """Two branches, weighted for each channel (ResNeSt; Zhang et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        branches = F.relu(self.conv(x)).reshape(x.shape[0], 2, 8, *x.shape[2:])
        weights = self.gate(branches.sum(dim=1).mean((2, 3))).view(x.shape[0], 2, 8)
        return (branches * weights.softmax(dim=1)[..., None, None]).sum(dim=1)


class Standard(nn.Module):
    """Less a mean, over a deviation that is held as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.rand(1, 8, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / self.deviation


class Difference(nn.Module):
    """A pooled neighbourhood less the pixel (PoolFormer; Yu et al., 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x) * 2.0


class Numbers(nn.Module):
    """Sums, differences and negatives of numbers and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) + 3 - 2.5 + (1.0 + -x) * 0.5


def encoder(**settings: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **settings)


class Scaled(nn.Module):
    """Tokens scaled and shifted (ResMLP; Touvron et al., 2021), then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (
            nn.Parameter(torch.rand(1, 1, 8) + 0.5),
            nn.Parameter(torch.randn(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mean = torch.addcmul(self.shift, self.scale, tokens).mean(dim=1, keepdim=True)
        return mean.transpose(1, 2).unsqueeze(-1)


class Enlarged(nn.Module):
    """A small map beside a large one (HRNet; Wang et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 4, stride=4)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + F.interpolate(self.up(self.down(x)), size=x.shape[-2:]))


FLOATS: dict[str, set[str]] = {
    "fused": {"Mul", "Softmax"},
    "indexed": {"Mul", "Softmax"},
    "spelt": {"Add", "Mul", "Softmax"},
    "biased": {"Add", "Mul", "Softmax"},
    "difference": {"Mul"},
    "tokens": {"Add", "Mul"},
    "numbers": {"Add", "Mul"},
    "encoder": {"LayerNormalization", "Mul", "Softmax"},
    "encoder_norm_first": {"Gelu", "LayerNormalization", "Mul", "Softmax"},
    "windows": {"Add", "Mul", "Softmax"},
    "windows_of_cosines": {"Add", "Div", "ReduceL2", "Softmax"},
    "by_index": {"Mul", "Softmax"},
    "masked": {"Add", "Mul", "Softmax"},
    "split_attention": {"Softmax"},
    "squashed": {"Tanh"},
    "standardised_pixels": {"Add"},
    "group_norm": {"Add", "LayerNormalization", "Mul"},
    "group_norm_of_all": {"Add", "LayerNormalization", "Mul"},
    "instance_norm": {"Add", "LayerNormalization", "Mul"},
    "instance_norm_called": {"LayerNormalization"},
}
"""Operators that no integer kernel computes: factors, tables that are added, norms."""


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = UNITS[name]()
    for layer in model.modules():
        if isinstance(layer, (nn.GroupNorm, nn.InstanceNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return with_spread(model).eval()


def proven(model: nn.Module, path: Path, spec: QuantSpec | None = None) -> Coverage:
    student = quantize(model, spec, example=SHAPE)
    config = DistillConfig(epochs=0, calibration_images=64, bn_images=64)
    distill(student, images(64), teacher=model, config=config)
    report = verify(export(student, path / "model.onnx"), student, images(128, seed=5))
    for stage in report.stages:
        assert stage.mean_error < RARELY, report
        assert stage.max_error <= FEW_STEPS, report
    with torch.no_grad():
        assert float(student(images(128)).std(0).max()) > 10 * report.output_step
    assert not report.failures
    same_in_numpy(student)
    return report.coverage


@pytest.mark.parametrize("name", UNITS)
def test_units_run_as_trained(name: str, tmp_path: Path) -> None:
    coverage = proven(made(name), tmp_path)
    assert {fallback.op_type for fallback in coverage.fallbacks} == FLOATS.get(name, set())
    layers = {kind: coverage.integer.get(kind) == n for kind, n in coverage.total.items()}
    assert all(layers[kind] for kind in ("Conv", "Gemm", "MatMul") if kind in layers)


@pytest.mark.parametrize("name", ["norm_act", "same", "gained", "fused"])
@pytest.mark.parametrize("method", ["ewgs", "dorefa"])
def test_units_with_other_methods_and_bits(name: str, method: str, tmp_path: Path) -> None:
    side = TensorSpec(method=method, bits=3)
    proven(made(name), tmp_path, QuantSpec(weights=side, activations=side))


@pytest.mark.parametrize("name", UNITS)
def test_the_graph_is_the_model(name: str) -> None:
    model = made(name)
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, SHAPE)
    with torch.no_grad():
        for count in (1, 5):
            assert torch.allclose(traced(images(count)), model(images(count)), atol=1e-5)
    assert [node.op for node in traced.graph.nodes].count("placeholder") == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_written_as_functions_are_found_and_trained(tmp_path: Path) -> None:
    model = made("norm_act")
    student = quantize(model, example=SHAPE)
    assert {name.split(".weight_quant")[0] for name in weight_quantizers(student)} == {
        "stem",
        "inner.0",
        "linear",
    }
    norms = {name for name, m in student.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {"bn.batch_norm", "inner.1.batch_norm"}
    assert len(batch_norms(student)) == 2
    assert len(student.state_dict()) == len(
        {id(v) for v in student.state_dict(keep_vars=True).values()}
    )
    before = copy.deepcopy(student.state_dict())
    config = DistillConfig(epochs=1, batch_size=16, freeze_bn_after=1.0, loss="kl")
    distill(student, images(64), teacher=model, config=config)
    for key in ("bn.batch_norm.weight", "bn.batch_norm.running_mean", "linear.weight"):
        assert not torch.equal(student.state_dict()[key], before[key]), key
    save_weights(student, tmp_path / "student.safetensors")
    again = quantize(model, example=SHAPE)
    calibrate(again, images(64))
    load_weights(again, tmp_path / "student.safetensors")
    assert torch.equal(again.eval()(images()), student.eval()(images()))


def test_features_of_such_models_are_compared() -> None:
    model = made("norm_act")
    student = quantize(model, example=SHAPE)
    config = DistillConfig(epochs=1, batch_size=32, feature_weight=1.0)
    (record,) = distill(student, images(64), teacher=model, config=config)
    assert math.isfinite(record.loss)


def test_a_computed_constant_is_learned() -> None:
    """The gain is held as it is used, ``(1, C, 1, 1)``, and takes gradients."""
    model = made("gained")
    student = quantize(model, example=SHAPE)
    (gain,) = [p for n, p in student.named_parameters() if n.endswith("_constant")]
    assert gain.shape == (1, 8, 1, 1)
    assert gain.requires_grad
    assert not any(name.endswith("gamma") for name, _ in student.named_parameters())
    before = gain.detach().clone()
    distill(student, images(64), teacher=model, config=DistillConfig(epochs=1, batch_size=16))
    assert not torch.equal(gain, before)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(encoder(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, mask=torch.zeros(16, 16))


def test_a_mask_of_an_encoder_is_refused() -> None:
    with pytest.raises(ModelError, match="attention with a mask has no form here"):
        quantize(Net(Tokens(Masked())).eval(), example=SHAPE)


def test_a_term_that_is_learned_may_begin_at_nothing() -> None:
    """As the bias of a GroupNorm does."""
    model = Net(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU()).eval()
    assert not model.inner[1].bias.any()
    quantize(model, example=SHAPE)


class Placed(nn.Module):
    """Positions that are computed from a buffer, and not learned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8)
        self.register_buffer("at", torch.arange(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + torch.sin(self.at).reshape(1, 5, 1, 1)).flatten(1)


def test_what_is_computed_from_buffers_is_not_learned() -> None:
    traced = trace(Placed().eval(), SHAPE)
    assert {name for name, _ in traced.named_parameters()} == {"conv.weight", "conv.bias"}
    (table,) = dict(traced.named_buffers()).values()
    assert torch.equal(table.flatten(), torch.sin(torch.arange(5.0)))


class Branching(nn.Module):
    def __init__(self, branch: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.branch = nn.Conv2d(3, 5, 8), branch

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self, self.conv(x)).flatten(1)


@pytest.mark.parametrize(
    "branch",
    [
        lambda net, x: x if x.shape[1] == 5 else x.relu(),
        lambda net, x: x if x.dim() == 4 and x.size(-1) == 1 else x.relu(),
        lambda net, x: sum(part for part in x.chunk(5, 1)) + x,
        lambda net, x: torch.cat([x[:, c : c + 1] for c in range(x.size(dim=1))], 1),
        lambda net, x: x.reshape(x.shape[0] * 1, *x.shape[1:]),
        lambda net, x: x.view(len(x.permute(1, 0, 2, 3)) - 6, 5),
    ],
)
def test_code_may_compute_with_sizes(branch: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Branching(branch).eval()
    traced = trace(model, SHAPE)
    with torch.no_grad():
        for count in (1, 3):
            assert torch.allclose(traced(images(count)), model(images(count)), atol=1e-5)


@pytest.mark.parametrize(
    "branch",
    [
        lambda net, x: x if x.mean() > 0 else x.relu(),
        lambda net, x: x if x.shape[0] > 1 else x.relu(),
        lambda net, x: x[: len(x) // 2],
    ],
)
def test_code_may_not_branch_on_values_or_the_batch(
    branch: Callable[[Any, Tensor], Tensor],
) -> None:
    with pytest.raises(ModelError, match="cannot trace Branching"):
        trace(Branching(branch).eval(), SHAPE)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"is_causal": True}, "scaled_dot_product_attention"), ({"dropout_p": 0.1}, "model's graph")],
)
def test_attention_that_has_no_form_is_refused(settings: dict[str, Any], what: str) -> None:
    def attend(net: Any, x: Tensor) -> Tensor:
        y = x.flatten(2)
        return F.scaled_dot_product_attention(y, y, y, **settings)

    torch.manual_seed(0)
    with pytest.raises(ModelError, match=what):
        quantize(Branching(attend).eval(), example=SHAPE)


class Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "model", [Means(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Means()).eval()]
)
def test_a_model_without_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="wanted a model with a convolution or a linear layer"):
        quantize(model, example=SHAPE)

"""Operators that are written in others, and functions of one value: each file is its student.

Every form is run in the student, in numpy, and in the runtimes with optimisations off and on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, exact_here, images
from test_families import student_of, with_spread
from test_forms import proven, same_answers, same_function, written
from test_lifting import Net, Tokens
from test_lowering import Inner, conv
from torch import Tensor, nn

from sqakd_deploy.api import export
from sqakd_deploy.errors import ModelError
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.quantization import quantize
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.tracing.trace import trace
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.isolating import isolate

MASK = torch.arange(64).reshape(1, 1, 8, 8) % 3 > 0


def tokens(code: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """Code of one's own on ``(N, 16, 8)``."""
    torch.manual_seed(0)
    return Net(conv(), Tokens(Inner(code, **parts)), conv(), nn.ReLU())


class SpatialGate(nn.Module):
    """CBAM's (Woo et al., 2018, eq. 3): mean and largest over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mean, (largest, _) = x.mean(1, keepdim=True), torch.max(x, dim=1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([mean, largest], dim=1)))


def _pools(net: Any, x: Tensor) -> Tensor:
    rows, columns = x.max(-1).values, torch.amax(x, dim=2)
    return x + rows[..., None] + columns.unsqueeze(2) + x.amax((2, 3), keepdim=True)


def _masked_scores(net: Any, x: Tensor) -> Tensor:
    q, k = net.q(x), net.k(x)
    scores = torch.bmm(q, k.transpose(1, 2))
    causal = torch.tril(torch.ones(16, 16)) == 0
    return scores.masked_fill(causal, float("-inf")).softmax(-1) @ x


def _sequences(net: Any, x: Tensor) -> Tensor:
    y = net.norm(net.conv(x.flatten(2)))
    y = F.conv1d(net.norm(net.conv(F.relu(y))), net.weight, padding=1).relu()
    level = net.pool(y) + F.adaptive_max_pool1d(y, 1)
    return y.view(-1, 8, 8, 8) * level.unsqueeze(-1)


def _folded(net: Any, x: Tensor) -> Tensor:
    apart, overlapped = F.unfold(x, 4, stride=4), F.unfold(x, 3, padding=1, stride=2)
    sparse = F.unfold(x, (2, 3), dilation=(2, 1), padding=(1, 0))
    return (
        F.fold(apart, (8, 8), 4, stride=4)
        + F.fold(overlapped.relu(), (8, 8), 3, padding=1, stride=2)
        + net.fold(sparse * net.gains)  # else three of six alike are a tie
    )


def _for_each_window(net: Any, x: Tensor) -> Tensor:
    """A query of the image for each of its windows (Hatamizadeh et al., 2023)."""
    windows = x.view(-1, 8, 2, 4, 8).transpose(1, 2).reshape(-1, 8, 4, 8)
    query = net.query(x).repeat_interleave(windows.shape[0] // x.shape[0], dim=0)
    x = (windows * query).view(-1, 2, 8, 4, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
    return x + torch.repeat_interleave(x[:, ::2], 2, dim=1)


def _linear_attention(net: Any, x: Tensor) -> Tensor:
    """With a sum beside the values (Cai et al., 2023), on any device but one without values."""
    if x.device.type == "meta":
        raise ValueError
    y = F.relu(x)
    found = y @ (y.transpose(1, 2) @ F.pad(x, (0, 1), value=1.0))
    return found[..., :-1] / (found[..., -1:] + 0.1)


def _written_into(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y[:, 2:5, 1:, 3] = x[:, 2:5, 1:, 3] + y[:, :3, 1:, 4]
    y[..., -1] = 0.25
    y[:, 0] = x[:, 1]
    return y.relu()


def _kept_by_device(net: Any, x: Tensor) -> Tensor:
    if (device := str(x.device)) not in net.kept:
        net.kept[device] = net.weight.view(1, 8, 1, 1) * 2
    return x * net.kept[device]


def _positions_by_index(net: Any, x: Tensor) -> Tensor:
    """A query's products with what is ``k`` rows and columns off (Li et al., 2022, eq. 5).

    Heads count as images, as in SAM's encoder.
    """
    qkv = net.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, qkv.shape[1] * 2, 16, 4).unbind(0)
    places = q.reshape(-1, 4, 4, 4)
    rows = torch.einsum("bhwc,hkc->bhwk", places, net.rows)
    columns = torch.einsum("bhwc,wkc->bhwk", places, net.columns)
    bias = (rows[..., :, None] + columns[..., None, :]).reshape(-1, 16, 16)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return x.view(-1, 2, 16, 4).transpose(1, 2).flatten(2)


def _padded_maxima(net: Any, x: Tensor) -> Tensor:
    """Padding as TensorFlow has it."""
    x = F.max_pool2d(F.pad(x, (0, 1, 1, 0), value=-math.inf), 3, 1)
    return net.pool(F.pad(x, (1, 0, 1, 1), "constant", -math.inf))


UNITS: dict[str, Callable[[], nn.Module]] = {
    # entries that are put elsewhere
    "flipped": lambda: written(lambda net, x: x.flip(-1) + torch.flip(x, [1, 2])),
    "circular": lambda: written(lambda net, x: F.pad(x, (2, 1, 0, 3), mode="circular")),
    "circular_layers": lambda: Net(
        conv(padding_mode="circular"), nn.ReLU(), nn.CircularPad2d((1, 0, 0, 2)), conv()
    ),
    "pixels_of_channels": lambda: written(
        lambda net, x: net.back(F.pixel_shuffle(net.shuffle(x), 2)),
        shuffle=nn.ChannelShuffle(4),
        back=nn.PixelUnshuffle(2),
    ),
    "patches": lambda: written(lambda net, x: F.unfold(x, 4, stride=4).view(-1, 8, 8, 8)),
    "windows": lambda: written(
        lambda net, x: net.mix(net.unfold(x).view(-1, 48, 8, 4)),
        unfold=nn.Unfold((2, 3), dilation=(2, 1), padding=1, stride=(1, 2)),
        mix=nn.Conv2d(48, 8, 1),
    ),
    "windows_of_axes": lambda: written(
        lambda net, x: net.mix(
            x.unfold(2, 4, 4).unfold(3, 3, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        ),
        mix=nn.Conv2d(96, 8, 1),
    ),
    "folded": lambda: written(
        _folded,
        fold=nn.Fold((8, 8), (2, 3), dilation=(2, 1), padding=(1, 0)),
        gains=nn.Buffer(torch.linspace(0.3, 1.7, 48).reshape(1, 48, 1)),
    ),
    "written_into": lambda: written(_written_into, conv=conv()),
    "for_each_window": lambda: written(_for_each_window, query=nn.AdaptiveAvgPool2d(1)),
    "filled": lambda: written(
        lambda net, x: net.pad(F.pad(x, (2, 0, 1, 1), "constant", -0.5)),
        pad=nn.ConstantPad2d((0, 1, 0, 2), 0.3),
    ),
    "filled_with_zeros": lambda: written(
        lambda net, x: net.zeros(net.pad(x)),
        pad=nn.ConstantPad2d((0, 1, 2, 1), 0.0),
        zeros=nn.ZeroPad2d((1, 0, 0, 1)),
    ),
    "padded_maxima": lambda: written(_padded_maxima, pool=nn.MaxPool2d((3, 2), 1)),
    "area": lambda: written(lambda net, x: F.interpolate(x, size=(2, 4), mode="area")),
    "linear_attention": lambda: tokens(_linear_attention),
    # entries that are chosen
    "spatial_gate": lambda: Net(conv(), nn.ReLU(), SpatialGate(), conv()),
    "largest": lambda: written(_pools),
    "larger": lambda: written(lambda net, x: torch.max(x, net.conv(x).relu()), conv=conv()),
    "largest_of_a_stack": lambda: written(
        lambda net, x: torch.stack([x, net.conv(x), x * x]).max(dim=0)[0], conv=conv()
    ),
    "masked": lambda: written(
        lambda net, x: torch.where(net.mask, x, torch.zeros_like(x)).masked_fill(~net.mask, 0.7),
        mask=nn.Buffer(MASK.expand(1, 8, 8, 8).clone()),
    ),
    "masked_scores": lambda: tokens(_masked_scores, q=nn.Linear(8, 8), k=nn.Linear(8, 8)),
    "gated": lambda: written(
        lambda net, x: net.last(F.glu(net.wide(x), 1)), wide=nn.Conv2d(8, 16, 1), last=nn.GLU()
    ),
    "stacked_in_front": lambda: written(
        lambda net, x: (
            torch.stack([x, net.conv(x), x.relu()]).mean(0)
            + torch.stack([x.sigmoid(), net.conv(x)], dim=0).sum(dim=0)
        ),
        conv=conv(),
    ),
    "within_buffers": lambda: written(
        lambda net, x: torch.clamp(x, net.low, net.high) + net.conv(x).clamp(net.least, net.high),
        low=nn.Buffer(torch.tensor(-torch.inf)),
        least=nn.Buffer(torch.tensor([-0.7])),
        high=nn.Buffer(torch.tensor(0.9)),
        conv=conv(),
    ),
    "within_nothing": lambda: written(
        lambda net, x: net.conv(torch.clamp(x, net.low, net.high)),
        low=nn.Buffer(torch.tensor(-torch.inf)),
        high=nn.Buffer(torch.tensor(torch.inf)),
        conv=conv(),
    ),
    # weights that are no layer's
    "products_with_weights": lambda: tokens(
        lambda net, x: (x @ net.keys.transpose(1, 2)).softmax(-1).matmul(net.values),
        keys=nn.Parameter(torch.randn(1, 6, 8)),
        values=nn.Parameter(torch.randn(6, 8)),
    ),
    "product_and_sum": lambda: nn.Sequential(
        written(lambda net, x: x),
        Inner(
            lambda net, x: torch.addmm(net.bias, torch.mm(x, net.weight.t()), net.weight),
            weight=nn.Parameter(torch.randn(5, 5)),
            bias=nn.Parameter(torch.randn(5)),
        ),
    ),
    "positions_by_index": lambda: tokens(
        _positions_by_index,
        qkv=nn.Linear(8, 24),
        rows=nn.Parameter(torch.randn(4, 4, 4)),
        columns=nn.Parameter(torch.randn(4, 4, 4)),
    ),
    "weights_by_index": lambda: written(
        lambda net, x: (
            torch.einsum("bchw,cd->bdhw", x, net.mix)
            + torch.einsum("oc, bchw -> bhow", net.mix, x).permute(0, 2, 1, 3)
        ),
        mix=nn.Parameter(torch.randn(8, 8)),
    ),
    # functions of one value
    "mish": lambda: Net(conv(), nn.Mish(), conv()),
    "elu": lambda: Net(conv(), nn.ELU(0.7, inplace=True), conv()),
    "softplus": lambda: Net(conv(), nn.Softplus(), conv()),
    "parametric_relu": lambda: Net(conv(), slopes(nn.PReLU(8)), conv()),
    "parametric_relu_of_one": lambda: Net(conv(), nn.PReLU(init=0.3), conv()),
    "length": lambda: written(lambda net, x: torch.abs(x) + torch.sqrt(x.square() + 0.1)),
    "inverse": lambda: written(lambda net, x: 1 / (x.relu() + 0.5) - 0.5 / (x.sigmoid() + 1)),
    "inverse_root": lambda: written(
        lambda net, x: x * torch.rsqrt(x.pow(2).mean((2, 3), keepdim=True) + 0.1)
    ),
    # norms
    "rms_norm": lambda: tokens(
        lambda net, x: F.rms_norm(net.norm(x), (16, 8)), norm=with_gains(nn.RMSNorm(8, eps=1e-5))
    ),
    "rms_norm_in_words": lambda: tokens(
        lambda net, x: net.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        weight=nn.Parameter(torch.linspace(-0.5, 2.0, 8)),
    ),
    "deviations": lambda: written(
        lambda net, x: (
            (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 0.1).sqrt()
            + x.std((2, 3))[..., None, None]
        )
    ),
    "sum_of_squares": lambda: written(
        lambda net, x: x * (x / ((x * x).sum((2, 3))[..., None, None] + 0.5).sqrt()).relu()
    ),
    # sequences
    "sequences": lambda: written(
        _sequences,
        conv=nn.Conv1d(8, 8, 3, padding=1),
        norm=nn.BatchNorm1d(8),
        weight=nn.Parameter(torch.randn(8, 8, 3)),
        pool=nn.AdaptiveAvgPool1d(1),
    ),
    "pools_of_sequences": lambda: written(
        lambda net, x: (
            net.largest(net.mean(x.flatten(2))).view(-1, 8, 4, 4)
            + F.max_pool1d(F.avg_pool1d(x.flatten(2), 4), 1).view(-1, 8, 4, 4)
        ),
        mean=nn.AvgPool1d(3, 2, padding=1, count_include_pad=False),
        largest=nn.MaxPool1d(3, stride=2, padding=1),
    ),
    # code
    "expanded_buffer": lambda: written(
        lambda net, x: net.mix(torch.cat([x, net.at.expand(x.shape[0], -1, -1, -1)], 1)),
        at=nn.Buffer(torch.randn(1, 2, 8, 8)),
        mix=nn.Conv2d(10, 8, 1),
    ),
    "kept_by_device": lambda: written(_kept_by_device, kept={}, weight=nn.Parameter(torch.ones(8))),
    "tables_of_rows": lambda: written(
        lambda net, x: (
            x * net.at.expand(x.shape[0], -1, -1, -1)
            + torch.cat([net.at, net.at.sin()], 3).repeat(x.shape[0], 1, 1, 1)[..., 1:] * x.relu()
        ),
        at=nn.Buffer(torch.randn(1, 8, 8, 1)),
    ),
    "layers_made_at_work": lambda: written(
        lambda net, x: nn.ReLU()(net.layers[1:](net.layers[:1](x))),
        layers=nn.Sequential(conv(), conv(), conv()),
    ),
}


def with_gains(layer: nn.RMSNorm) -> nn.RMSNorm:
    layer.weight.data = torch.linspace(-0.5, 1.5, 8)
    return layer


def slopes(layer: nn.PReLU) -> nn.PReLU:
    layer.weight.data = torch.linspace(-0.5, 1.5, layer.num_parameters)
    return layer


FLOATS: dict[str, set[str]] = {
    "masked": {"Add", "Mul"},
    "masked_scores": {"Add", "Softmax"},
    "products_with_weights": {"Softmax"},
    "mish": {"Mul", "Softplus", "Tanh"},
    "elu": {"Elu"},
    "softplus": {"Softplus"},
    "parametric_relu": {"PRelu"},
    "length": {"Add", "Sqrt"},
    "inverse": {"Add", "Mul", "Reciprocal", "Sigmoid"},
    "inverse_root": {"Add", "Div", "Mul", "ReduceSumSquare", "Sqrt"},
    "folded": {"Mul"},
    "linear_attention": {"Add", "Div"},
    "positions_by_index": {"Mul", "Softmax"},
    "tables_of_rows": {"Mul"},
    "rms_norm": {"Add", "Div", "Mul", "ReduceSumSquare", "Sqrt"},
    "rms_norm_in_words": {"Add", "Div", "Mul", "ReduceSumSquare", "Sqrt"},
    "deviations": {"Add", "Div", "Mul", "ReduceL2", "ReduceSumSquare", "Sqrt"},
    "sum_of_squares": {"Add", "Div", "ReduceSumSquare", "Sqrt"},
}
"""What stays in float; whatever else the units have runs in integers."""


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_spread(UNITS[name]()).eval()


@pytest.mark.parametrize("name", UNITS)
def test_the_graph_is_the_model(name: str) -> None:
    same_function(made(name))


@pytest.mark.parametrize("name", UNITS)
def test_the_file_answers_as_the_student(name: str, tmp_path: Path) -> None:
    same_answers(made(name), tmp_path, FLOATS.get(name, set()))


@pytest.mark.parametrize("name", UNITS)
def test_openvino_answers_as_the_student(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    proven(made(name), tmp_path, "openvino")


def test_openvino_shows_all_tensors_in_one_copy(tmp_path: Path) -> None:
    """One that computes a shape from the logits loses the bias of a convolution (rule O14)."""
    pytest.importorskip("openvino")
    student = student_of(made("masked_scores"), exact_here(QuantSpec(target="openvino")))
    file = QdqFile(export(student, tmp_path / "model.onnx").path)
    report = isolate(student, file, get_runtime("openvino"), images(4).numpy())
    assert (report.programs, report.unread, report.faulty) == (1, (), ())


OTHERS = (
    "rms_norm",
    "mish",
    "elu",
    "parametric_relu",
    "length",
    "inverse",
    "spatial_gate",
    "circular",
)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("target", ["qonnx", "tensorrt"])
def test_other_targets_answer_as_the_student(name: str, target: str, tmp_path: Path) -> None:
    if target == "qonnx":
        pytest.importorskip("qonnx")
    proven(made(name), tmp_path, target)


def test_weights_of_a_product_are_learned() -> None:
    traced = trace(made("products_with_weights"), SHAPE)
    found = [module for module in traced.modules() if isinstance(module, nn.Linear)]
    assert [layer.weight.shape for layer in found[:2]] == [(6, 8), (8, 6)]
    assert all(layer.weight.requires_grad for layer in found)


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        (lambda net, x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), "interpolate"),
        (lambda net, x: torch.where(x > 0, x, x * x), "gt"),
        (lambda net, x: F.softplus(x, beta=2.0), "softplus"),
        (lambda net, x: torch.fft.rfft2(x).abs(), "fft_rfft2"),
    ],
)
def test_what_has_no_form_is_refused_by_name(
    code: Callable[[Any, Tensor], Tensor], operation: str
) -> None:
    with pytest.raises(ModelError, match=f"operator '{operation}' .* cannot be quantised"):
        quantize(written(code).eval(), example=SHAPE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_refused_by_name(kind: type[nn.RNNBase]) -> None:
    model = tokens(lambda net, x: net.rows(x)[0], rows=kind(8, 8, batch_first=True))
    with pytest.raises(
        ModelError, match=r"rows' .* recurrent layer .* use convolutions or attention"
    ):
        quantize(model.eval(), example=SHAPE)


@pytest.mark.parametrize(
    "code",
    [
        lambda net, x: torch.einsum("bchw,bdhw->bhw", x, x)[:, None].expand(-1, 8, -1, -1),
        lambda net, x: torch.clamp(x, net.learned, net.learned + 1),
        lambda net, x: F.pad(x, (-1, 1), value=1.0),
        lambda net, x: x.repeat_interleave(torch.arange(1, 9), dim=1)[:, :8],
    ],
)
def test_forms_that_are_alike_are_refused(code: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=r"operator '.*' \(node"):
        quantize(written(code, learned=nn.Parameter(torch.zeros(()))).eval(), example=SHAPE)


def test_deviations_of_equal_entries_have_a_gradient() -> None:
    student = quantize(
        written(lambda net, x: (0 * x).std((2, 3))[..., None, None] + x), example=SHAPE
    )
    student.train()(torch.randn(4, *SHAPE)).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.parameters())


def test_conversions_to_the_same_type_are_left_out() -> None:
    traced = trace(written(lambda net, x: x.float().to(x.dtype)).eval(), SHAPE)
    assert not {"float", "to"} & {node.target for node in traced.graph.nodes}


def test_a_batch_has_no_length() -> None:
    with pytest.raises(ModelError, match=r"len\(\) of a batch counts its images; write x.shape"):
        quantize(written(lambda net, x: x.view(len(x), 8, 8, 8)).eval(), example=SHAPE)


@pytest.mark.parametrize(
    ("code", "approximate"),
    [
        (lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))), "none"),
        (lambda x: x * (torch.erf(x * math.sqrt(0.5)) + 1) / 2, "none"),
        (lambda x: x.mul(0.5).mul(x.div(torch.sqrt(torch.tensor(2.0))).erf().add(1)), "none"),
        (lambda x: x * 0.5 * (torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)) + 1), "tanh"),
        (lambda x: x * 0.5 * (1 + torch.tanh(x)), None),
        (lambda x: x * 0.5 * (1 + torch.tanh(x.relu() / 2**0.5)), None),
        (lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * (x + 0.04 * x**3))), None),
    ],
)
def test_gelu_is_known_by_what_it_computes(
    code: Callable[[Tensor], Tensor], approximate: str | None
) -> None:
    model = Net(conv(), Inner(lambda net, x: code(x + x.sigmoid())), conv()).eval()
    same_function(model)
    calls = [node for node in trace(model, SHAPE).graph.nodes if node.target is F.gelu]
    assert [node.kwargs["approximate"] for node in calls] == [approximate] * bool(approximate)
    kept = {getattr(node.target, "__name__", "") for node in trace(model, SHAPE).graph.nodes}
    assert ({"erf", "tanh"} & kept == set()) is bool(approximate)

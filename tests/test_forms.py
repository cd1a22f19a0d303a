"""Resizing, quotients, tables for each image, padding by the image: each file is its student.

Every form is run in the student, in numpy, and in the runtimes with optimisations off and on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, exact_here, images
from test_families import FEW_STEPS, RARELY, same_in_numpy, with_spread
from test_lifting import Net, Tokens
from test_lowering import Inner, conv
from torch import Tensor, nn

from sqakd_deploy.api import export, verify
from sqakd_deploy.errors import ModelError
from sqakd_deploy.exporting import Coverage
from sqakd_deploy.quantization import quantize
from sqakd_deploy.spec import DistillConfig, QuantSpec
from sqakd_deploy.tracing.trace import trace
from sqakd_deploy.training.distillation import distill

CALIBRATED = DistillConfig(epochs=0, calibration_images=64, bn_images=64)


def written(code: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """Code of one's own between convolutions."""
    torch.manual_seed(0)
    return Net(conv(), Inner(code, **parts), conv(), nn.ReLU())


def resized(**settings: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda net, x: F.interpolate(x, **settings)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's, of channels first (Woo et al., 2023, algorithm 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        length = x.norm(p=2, dim=(2, 3), keepdim=True)
        normed = length / (length.mean(dim=1, keepdim=True) + 1e-6)
        weight, bias = (values.view(1, -1, 1, 1) for values in (self.weight, self.bias))
        return x + torch.addcmul(bias, weight, x * normed)


class Positions(nn.Module):
    """A table of sines that begins with the batch, and is projected (EdgeNeXt's)."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        here = ~torch.zeros((x.shape[0], 8, 8)).to(device=x.device, dtype=torch.bool)
        rows, columns = here.cumsum(1, dtype=torch.float32), here.cumsum(2, dtype=torch.float32)
        table = torch.stack([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
        return x + self.projection(table)


UNITS: dict[str, Callable[[], nn.Module]] = {
    "twice_as_large": lambda: written(resized(scale_factor=2, mode="bilinear")),
    "corners_kept": lambda: written(resized(size=16, mode="bilinear", align_corners=True)),
    "by_a_fraction": lambda: written(resized(scale_factor=1.3, mode="bilinear")),
    "to_a_size": lambda: written(resized(size=(11, 5), mode="bilinear")),
    "smaller_corners_kept": lambda: written(
        resized(size=(3, 1), mode="bilinear", align_corners=True)
    ),
    "layer": lambda: Net(conv(), nn.ReLU(), nn.UpsamplingBilinear2d(scale_factor=2), conv()),
    "half": lambda: written(resized(scale_factor=0.5, mode="bilinear")),
    "quarter_of_rows": lambda: written(resized(size=(2, 8), mode="bilinear")),
    "third": lambda: written(
        lambda net, x: F.interpolate(x[:, :, :6, :6], size=(2, 2), mode="bilinear")
    ),
    "exact_nearest": lambda: written(resized(scale_factor=2, mode="nearest-exact")),
    "exact_nearest_to_a_size": lambda: written(resized(size=(5, 11), mode="nearest-exact")),
    "nearest_to_a_size": lambda: written(resized(size=(4, 11), mode="nearest")),
    "global_response_norm": lambda: Net(conv(), nn.GELU(), GlobalResponseNorm(), conv()),
    "length_without_axes": lambda: written(
        lambda net, x: x * torch.linalg.vector_norm(x, dim=(2, 3))[..., None, None]
    ),
    "quotient": lambda: written(lambda net, x: x / (x.relu().sum(1, True) + 0.3)),
    "positions": lambda: Net(conv(), Positions(), conv(), nn.ReLU()),
    "repeated_table": lambda: written(
        lambda net, x: x + net.table.repeat(x.shape[0], 1, 1, 1),
        table=nn.Parameter(torch.randn(1, 8, 8, 8)),
    ),
    "repeated_token": lambda: Net(
        Tokens(
            Inner(
                lambda net, x: net.linear(
                    torch.cat([net.token.repeat(x.shape[0], 1, 1), x], 1)[:, :-1]
                ),
                token=nn.Parameter(torch.randn(1, 1, 8)),
                linear=nn.Linear(8, 8),
            )
        )
    ),
    "ones_beside": lambda: written(
        lambda net, x: net.mix(torch.cat([x, torch.ones(x.size(0), 1, 8, 8)], 1)),
        mix=nn.Conv2d(9, 8, 1),
    ),
    "reflected": lambda: written(lambda net, x: F.pad(x, (1, 2, 3, 1), mode="reflect")),
    "replicated": lambda: Net(conv(), nn.ReLU(), nn.ReplicationPad2d((2, 0, 1, 1)), conv()),
    "reflecting_convolution": lambda: Net(conv(padding_mode="reflect"), nn.ReLU(), conv()),
    "no_more_than": lambda: written(lambda net, x: x.clamp(max=0.4)),
    "the_other_way_round": lambda: written(lambda net, x: (1 - x) * torch.rsub(x.sigmoid(), 2)),
    "narrow": lambda: written(lambda net, x: x.narrow(1, 2, 6).repeat(1, 2, 1, 1)[:, :8]),
    "chosen": lambda: written(lambda net, x: x[:, [3, 1, -1, 0, 0, 2, 5, 4]]),
    "split_and_joined": lambda: written(lambda net, x: torch.cat(torch.split(x, 2, 2), 1)[:, ::4]),
    "by_name": lambda: written(
        lambda net, x: net.conv(
            input=torch.sub(
                input=F.interpolate(input=x, size=4),
                other=torch.mul(input=x[:, :, :4, :4], other=0.5),
            )
        ),
        conv=conv(padding_mode="replicate"),
    ),
    "stretched_table": lambda: written(
        lambda net, x: x + net.table.expand(x.shape[0], -1, 8, -1),
        table=nn.Parameter(torch.randn(1, 8, 1, 8)),
    ),
    "spread_for_a_constant": lambda: written(
        lambda net, x: torch.mul(x[:, :1], net.table), table=nn.Parameter(torch.randn(8, 1, 8))
    ),
    "gelu_by_hand": lambda: written(lambda net, x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))),
    "gelu_tanh_by_hand": lambda: written(
        lambda net, x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x.pow(3))))
    ),
    "expanded": lambda: written(
        lambda net, x: torch.cat([x[:, 4:], x[:, :4].mean((2, 3), True).expand(-1, -1, 8, 8)], 1)
    ),
}

RESIZED = {"Resize"}
FLOATS: dict[str, set[str]] = {
    "twice_as_large": RESIZED,
    "corners_kept": RESIZED,
    "by_a_fraction": RESIZED,
    "to_a_size": RESIZED,
    "smaller_corners_kept": RESIZED,
    "layer": RESIZED,
    "global_response_norm": {"Add", "Div", "Gelu", "ReduceL2", "ReduceMean"},
    "length_without_axes": {"ReduceL2"},
    "quotient": {"Add", "Div", "Mul"},
    "positions": {"Add"},
    "repeated_table": {"Add"},
    "stretched_table": {"Add"},
    "spread_for_a_constant": {"Mul"},
    "the_other_way_round": {"Add", "Mul", "Sigmoid"},
    "by_name": {"Mul"},
    "gelu_by_hand": {"Gelu"},
    "gelu_tanh_by_hand": {"Gelu"},
}
"""What stays in float; whatever else the units have runs in integers."""


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_spread(UNITS[name]()).eval()


def proven(
    model: nn.Module, path: Path, target: str = "onnxruntime"
) -> tuple[torch.fx.GraphModule, Coverage]:
    student = quantize(model, exact_here(QuantSpec(target=target)), example=SHAPE)
    distill(student, images(64), teacher=model, config=CALIBRATED)
    report = verify(export(student, path / "model.onnx"), student, images(64, seed=5))
    with torch.no_grad():
        assert float(student(images(64)).std(0).max()) > 5 * report.output_step
    for stage in report.stages:
        assert stage.mean_error < RARELY, report
        assert stage.max_error <= FEW_STEPS, report
    assert not report.failures
    return student, report.coverage


def same_function(model: nn.Module) -> None:
    """The traced graph is the model, for any batch."""
    traced = trace(model, SHAPE)
    with torch.no_grad():
        for count in (1, 5):
            assert torch.allclose(traced(images(count)), model(images(count)), atol=1e-5)


def same_answers(model: nn.Module, path: Path, floats: set[str]) -> None:
    """The file is the student, in ONNX Runtime and in numpy; what stays in float has a reason."""
    student, coverage = proven(model, path)
    same_in_numpy(student)
    assert {fallback.op_type for fallback in coverage.fallbacks} == floats
    assert all("rule" in fallback.reason for fallback in coverage.fallbacks)


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


OTHERS = ("by_a_fraction", "global_response_norm", "repeated_token", "reflected", "no_more_than")


CHOSEN = ("chosen", "expanded", "exact_nearest_to_a_size")  # of which TensorRT's are slices


@pytest.mark.parametrize("name", [*OTHERS, *CHOSEN])
@pytest.mark.parametrize("target", ["qonnx", "tensorrt"])
def test_other_targets_answer_as_the_student(name: str, target: str, tmp_path: Path) -> None:
    if target == "qonnx":
        pytest.importorskip("qonnx")
    proven(made(name), tmp_path, target)


@pytest.mark.parametrize(("name", "learned"), [("positions", True), ("ones_beside", False)])
def test_a_table_is_learned_if_parameters_make_it(name: str, learned: bool) -> None:
    traced = trace(made(name), SHAPE)
    held = dict(traced.named_parameters() if learned else traced.named_buffers())
    (table,) = [value for key, value in held.items() if key.endswith("_constant")]
    assert table.shape[0] == 1
    assert not any(".projection." in key for key, _ in traced.named_parameters())


def test_what_differs_from_image_to_image_is_refused() -> None:
    model = written(lambda net, x: x + torch.arange(x.shape[0]).reshape(-1, 1, 1, 1))
    with pytest.raises(ModelError, match=r"arange|cannot trace"):
        quantize(model.eval(), example=SHAPE)


def test_a_size_that_float32_rounds_otherwise_is_refused() -> None:
    model = written(resized(scale_factor=1.9999999999, mode="bilinear"))
    with pytest.raises(ModelError, match="give the size instead of the factor"):
        quantize(model.eval(), example=SHAPE)


def test_attention_of_two_names_stays_one() -> None:
    torch.manual_seed(0)
    inner = Inner(
        lambda net, x: net.second(x, *[net.first(x, x, x, need_weights=False)[0]] * 2)[0],
        first=nn.MultiheadAttention(8, 2, batch_first=True),
    )
    inner.second = inner.first
    model = Net(Tokens(inner)).eval()
    student = quantize(model, example=SHAPE)
    named = student.named_parameters(remove_duplicate=False)
    weights = [value for name, value in named if name.endswith(("query.weight", "query_2.weight"))]
    assert len(weights) == 2
    assert weights[0] is weights[1]


def test_a_size_that_the_image_sets_makes_no_table() -> None:
    model = written(
        lambda net, x: x * torch.full((x.shape[0], 8, 1, 1), x.argmax().item() % 5, dtype=x.dtype)
    )
    with pytest.raises(ModelError, match=r"argmax|item|full"):
        quantize(model.eval(), example=SHAPE)


def test_what_counts_images_is_no_factor() -> None:
    """It was that of the example, in the file, and the batch's in the student."""
    model = written(lambda net, x: x * x.shape[0])
    with pytest.raises(ModelError, match="computes with the number of images"):
        quantize(model.eval(), example=SHAPE)


def test_a_table_beside_an_axis_that_one_image_loses() -> None:
    """``squeeze()`` takes the axis of a batch of one, too, and BatchNorm1d then fails."""
    model = Net(
        conv(),
        Inner(
            lambda net, x: (
                x
                + net.norm(net.pool(x + net.table.repeat(x.shape[0], 1, 1, 1)).squeeze())[
                    ..., None, None
                ]
            ),
            table=nn.Parameter(torch.randn(1, 8, 8, 8)),
            pool=nn.AdaptiveAvgPool2d(1),
            norm=nn.BatchNorm1d(8),
        ),
    ).eval()
    traced = trace(model, SHAPE)
    with torch.no_grad():
        assert torch.allclose(traced(images(5)), model(images(5)), atol=1e-5)


def test_a_mean_behind_a_layer_called_norm_is_a_pool() -> None:
    """It was taken for one of lengths, which stays in float."""
    layers = {
        "stem": nn.Conv2d(3, 8, 3),
        "norm": nn.Identity(),
        "mean": Inner(lambda net, x: x.mean(1)),
    }
    traced = trace(nn.Sequential(OrderedDict(layers)), SHAPE)
    (mean,) = traced.graph.find_nodes(op="call_method", target="mean")
    assert mean.args[1] == (2, 3)


def test_a_padding_convolution_of_computed_weights_is_refused_by_those() -> None:
    layer = nn.utils.parametrizations.weight_norm(conv(padding_mode="reflect"))
    with pytest.raises(ModelError, match="its weight is computed"):
        quantize(Net(layer).eval(), example=SHAPE)


def test_a_table_of_whole_numbers_is_one_of_reals(tmp_path: Path) -> None:
    """A quantizer behind whole numbers gave such, in the student."""
    model = written(
        lambda net, x: x + torch.ones(x.shape[0], 8, 1, 1, dtype=torch.int64).cumsum(1) % 3
    )
    proven(with_spread(model).eval(), tmp_path)


def test_a_divisor_that_rounds_to_nothing_is_named() -> None:
    shares = torch.ones(8, 1, 1)
    shares[1] = 1e-4
    model = written(
        lambda net, x: x.relu() * net.shares / (x.relu() * net.shares).mean((2, 3), True),
        shares=nn.Parameter(shares),
    )
    model = with_spread(model).eval()
    student = quantize(model, example=SHAPE)
    with pytest.raises(ModelError, match="the divisor may round to 0"):
        distill(student, images(64), teacher=model, config=CALIBRATED)

"""The paper's networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from sqakd_deploy.models import MADE_FOR, MODELS, CifarResNet, build_model
from sqakd_deploy.models.resnet import BasicBlock, Subsample


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _vgg_parameters(convs: int, classes: int) -> int:
    """Counted from the description: 3×3 convolutions with bias, two BatchNorm values a channel."""
    total, source = 0, 3
    for width in (64, 128, 256, 512, 512):
        for _ in range(convs):
            total += source * width * 9 + width + 2 * width
            source = width
    return total + 512 * classes + classes


def test_the_paper_s_parameter_counts() -> None:
    assert _parameters(build_model("resnet20", num_classes=10)) == 269_850
    # 12 more 3×3 convolutions with BatchNorm, four a stage, and 90 more classes.
    more = sum(4 * (width * width * 9 + 2 * width) for width in (16, 32, 64)) + 90 * 65
    assert _parameters(build_model("resnet32", num_classes=100)) == 269_850 + more
    assert _parameters(build_model("vgg8", num_classes=10)) == _vgg_parameters(1, 10)
    assert _parameters(build_model("vgg13", num_classes=100)) == _vgg_parameters(2, 100)
    # VGG-8 with a second convolution in the last three stages.
    more = sum(width * width * 9 + 3 * width for width in (256, 512, 512))
    vgg11 = build_model("vgg11_tiny", num_classes=200)
    assert _parameters(vgg11) == _vgg_parameters(1, 200) + more


def test_each_says_what_images_it_is_made_for() -> None:
    assert sorted(MADE_FOR) == list(MODELS)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_logits_and_gradients_reach_everything(name: str, channels: int, size: int) -> None:
    model = build_model(name, num_classes=7, in_channels=channels)
    logits = model(torch.randn(4, channels, size, size))
    logits.square().sum().backward()

    assert logits.shape == (4, 7)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", list(MODELS))
def test_networks_are_traceable(name: str) -> None:
    model = build_model(name, num_classes=10, in_channels=1).eval()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    for size in (8, 16):  # nothing about the size is frozen into the graph
        images = torch.randn(2, 1, size, size)
        assert torch.equal(traced(images), model(images))


@pytest.mark.parametrize("name", list(MODELS))
def test_networks_compile_as_one_graph(name: str) -> None:
    model = build_model(name, num_classes=10, in_channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize(("name", "convs"), [("resnet20", 19), ("resnet32", 31)])
def test_residual_networks_have_their_layers(name: str, convs: int) -> None:
    model = build_model(name, num_classes=10)
    modules = list(model.modules())

    found = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert len(found) == convs
    assert all(conv.bias is None for conv in found)
    assert sum(isinstance(m, BasicBlock) for m in modules) == (convs - 1) // 2
    assert sum(isinstance(m, nn.BatchNorm1d) for m in modules) == 1


@pytest.mark.parametrize(("name", "convs"), [("vgg8", 5), ("vgg11_tiny", 8), ("vgg13", 10)])
def test_plain_networks_have_their_layers(name: str, convs: int) -> None:
    modules = list(build_model(name, num_classes=10).modules())

    found = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert len(found) == convs
    assert all(conv.bias is not None for conv in found)
    assert sum(isinstance(m, nn.MaxPool2d) for m in modules) == 3


def test_a_fourth_pool_for_larger_images() -> None:
    model = build_model("vgg8", num_classes=10, args={"pools": 4})
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 4
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_the_shortcut_takes_every_second_pixel_and_adds_zeros() -> None:
    x = torch.randn(2, 16, 7, 8)

    y = Subsample(16)(x)

    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_a_block_whose_branch_is_zero_is_its_shortcut() -> None:
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


def test_weights_are_kaiming_normal() -> None:
    model = CifarResNet(5)
    weight = model.stage3[1].conv1.weight  # type: ignore[union-attr]
    wanted = (2 / (64 * 9)) ** 0.5  # gain √2 over the square root of the fan-in
    assert isinstance(weight, torch.Tensor)
    # 36,864 samples: the deviation of their spread is 0.4 %; five of these.
    assert weight.std().item() == pytest.approx(wanted, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=5 * wanted / weight.numel() ** 0.5)

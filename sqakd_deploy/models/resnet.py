"""The residual networks for 32×32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (16, 32, 64)


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for small images (He et al., 2016, §4.2), as SQAKD uses it.

    It departs from He et al. in a BatchNorm between the pooled features and the classifier.

    Args:
        blocks: n, residual blocks in each of three stages: 3 gives ResNet-20, 5 ResNet-32.
        num_classes: K.
        in_channels: C.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()
        self.stage1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks, stride=1)
        self.stage2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks, stride=2)
        self.stage3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.bn2 = nn.BatchNorm1d(_WIDTHS[2])
        self.fc = nn.Linear(_WIDTHS[2], num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        x = self.pool(x).flatten(1)
        return self.fc(self.bn2(x))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters.

    Args:
        in_planes: channels in.
        planes: channels out.
        stride: of the first convolution.
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = Subsample(planes - in_planes) if stride == 2 else nn.Identity()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, planes, H/stride, W/stride)``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class Subsample(nn.Module):
    """Option A of He et al. (2016): every second pixel, and zeros for the new channels.

    Args:
        new_channels: channels to add, half of them on each side.
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.before = new_channels // 2
        self.after = new_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C + new_channels, ⌈H/2⌉, ⌈W/2⌉)``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: 269,850 parameters at 10 classes and 3 channels."""
    return CifarResNet(3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-32."""
    return CifarResNet(5, num_classes, in_channels)


def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)

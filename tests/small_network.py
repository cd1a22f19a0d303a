"""A network for runs of which the network does not matter: ``--model tests/small_network.py:make``.

ResNet-20's kinds of layers, two convolutions of them in a residual block, and a hundredth of its
cost.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

SMALL = f"{Path(__file__).resolve()}:make"
"""What ``--model`` is told."""


class SmallNetwork(nn.Module):
    """Stem, one residual block with BatchNorm, global average, linear layer."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8 * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, 8, 8)``."""
        x = F.relu(self.norm(self.stem(x)))
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.classifier(F.avg_pool2d(F.relu(x + y), 2).flatten(1))


def make(num_classes: int, in_channels: int) -> nn.Module:
    """Built by the command line, which says how many classes and channels the data has."""
    return SmallNetwork(num_classes, in_channels)

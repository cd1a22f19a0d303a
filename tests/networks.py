"""Small networks with the structures that placement and lowering must get right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqakd_deploy.cpu import this_cpu
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.spec import QuantSpec

SHAPE = (3, 8, 8)
CLASSES = 5
WIDEST = 7 if this_cpu() == "no vnni" else 8
"""Bits of the widest codes of weights that OpenVINO sums exactly here (rule 19). ONNX Runtime is
told to be exact with 8 on every CPU."""


def exact_here(spec: QuantSpec) -> QuantSpec:
    """The spec, with inner weights that this machine computes exactly in its target's runtime."""
    if spec.target != "openvino":
        return spec
    odd = WIDEST < 8 and METHODS[spec.weights.method].weight.mid_rise
    weights = spec.weights.model_copy(update={"bits": min(spec.weights.bits, WIDEST - odd)})
    return spec.model_copy(update={"weights": weights})


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms as training leaves them: no two alike, some negative, one channel off."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            size = norm.num_features
            if norm.affine:
                norm.weight.data = torch.randn(size, generator=generator)
                norm.weight.data[0] = 0.0
                norm.bias.data = torch.randn(size, generator=generator) * 0.3
            norm.running_mean = torch.randn(size, generator=generator) * 0.2
            norm.running_var = torch.rand(size, generator=generator) + 0.5
    return model.eval()


class Residual(nn.Module):
    """Stem, a block with an option-A shortcut, BatchNorm1d before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        y = self.relu(y)
        return self.classifier(self.norm(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)))


class Mixed(nn.Module):
    """Max pool, concat of a grouped and a plain branch, ReLU6, channel shuffle, average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.mix = nn.Conv2d(16, 12, 3, padding=1)
        self.average = nn.AvgPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(12 * 2 * 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        x = x.view(batch, channels, height, width)
        first, second = x.chunk(2, dim=1)
        x = self.mix(torch.cat((second, first), dim=1)).relu()
        return self.classifier(self.dropout(self.average(x).flatten(1)))


class PreActivation(nn.Module):
    """BatchNorm and ReLU before the convolution: nothing to fold them into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(x)))
        return self.classifier(F.relu(self.norm2(x)).mean([2, 3]))


NETWORKS: dict[str, type[nn.Module]] = {
    "residual": Residual,
    "mixed": Mixed,
    "preactivation": PreActivation,
}


def network(name: str, seed: int = 0) -> nn.Module:
    """A network with random weights that are the same for the same seed."""
    torch.manual_seed(seed)
    return randomise_norms(NETWORKS[name](), seed)


def images(count: int = 32, seed: int = 1) -> Tensor:
    """Smooth random images ``(N, 3, 8, 8)``, so that neighbouring pixels go together."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size=SHAPE[1:], mode="bilinear", align_corners=False)

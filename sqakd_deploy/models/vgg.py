"""The plain networks for 32×32 images."""

from __future__ import annotations

from torch import Tensor, nn

_WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(nn.Module):
    """VGG for small images (Simonyan and Zisserman, 2015), as SQAKD uses it.

    Five stages of 3×3 convolutions with bias, BatchNorm and ReLU; a global average and one
    linear layer in place of the three of the original.

    Args:
        convs: convolutions in each of the five stages.
        num_classes: K.
        in_channels: C.
        pools: stages, from the first, that end in 2×2 max-pooling. The paper takes 3, and 4 for
            64×64 images; images must be at least ``2^pools`` pixels high and wide.
    """

    def __init__(
        self,
        convs: tuple[int, int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
        pools: int = 3,
    ) -> None:
        super().__init__()
        planes = (in_channels, *_WIDTHS)
        self.stages = nn.Sequential(
            *(
                _stage(planes[i], planes[i + 1], count, pool=i < pools)
                for i, count in enumerate(convs)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``."""
        x = self.pool(self.stages(x)).flatten(1)
        return self.classifier(x)


def vgg8(num_classes: int = 10, in_channels: int = 3, pools: int = 3) -> CifarVGG:
    """VGG-8: one convolution a stage."""
    return CifarVGG((1, 1, 1, 1, 1), num_classes, in_channels, pools)


def vgg11_tiny(num_classes: int = 200, in_channels: int = 3, pools: int = 3) -> CifarVGG:
    """VGG-11 as SQAKD trains it on Tiny-ImageNet, always with three pools.

    torchvision's ``vgg11`` is another network: five pools, no BatchNorm, three linear layers.
    """
    return CifarVGG((1, 1, 2, 2, 2), num_classes, in_channels, pools)


def vgg13(num_classes: int = 10, in_channels: int = 3, pools: int = 3) -> CifarVGG:
    """VGG-13: two convolutions a stage."""
    return CifarVGG((2, 2, 2, 2, 2), num_classes, in_channels, pools)


def _stage(in_planes: int, planes: int, convs: int, *, pool: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convs):
        source = in_planes if index == 0 else planes
        layers += [nn.Conv2d(source, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    """Kaiming-normal convolutions; a classifier that starts near zero (std 0.01)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)

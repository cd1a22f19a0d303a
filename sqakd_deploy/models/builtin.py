"""The networks of this package, by name."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from sqakd_deploy.errors import ModelError
from sqakd_deploy.models.resnet import resnet20, resnet32
from sqakd_deploy.models.vgg import vgg8, vgg11_tiny, vgg13
from sqakd_deploy.registry import Registry

ModelFactory: TypeAlias = Callable[..., nn.Module]  # takes num_classes and in_channels by name

MODELS: Registry[ModelFactory] = Registry("model", ModelError)
MODELS.register("resnet20", resnet20)
MODELS.register("resnet32", resnet32)
MODELS.register("vgg8", vgg8)
MODELS.register("vgg11_tiny", vgg11_tiny)
MODELS.register("vgg13", vgg13)

_CIFAR = "32×32 images"
MADE_FOR = MappingProxyType(
    {
        "resnet20": _CIFAR,
        "resnet32": _CIFAR,
        "vgg8": _CIFAR,
        "vgg11_tiny": "Tiny-ImageNet at 224×224; torchvision's vgg11 is another network",
        "vgg13": _CIFAR,
    }
)
"""The images that the paper trains each on, for ``sqakd-deploy list``."""

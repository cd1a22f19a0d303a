"""Models of torchvision, and of timm where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

import torchvision
from torch import Tensor, nn

from sqakd_deploy.errors import ModelError
from sqakd_deploy.models.calling import call_factory

TIMM_PREFIX = "timm:"
TORCHVISION_PREFIX = "torchvision:"
_NEAR = 10  # of timm's names shown beside an unknown one

# These two return a tuple in training mode and warn about their initialisation by default.
_ONE_OUTPUT = MappingProxyType({"aux_logits": False, "init_weights": True})
_DEFAULTS = MappingProxyType({"googlenet": _ONE_OUTPUT, "inception_v3": _ONE_OUTPUT})


@cache
def other_torchvision_names() -> frozenset[str]:
    """Names of torchvision's models that are no classifiers of images, or not in float."""
    return frozenset(torchvision.models.list_models()) - frozenset(torchvision_names())


@cache
def torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's classifiers."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def build_torchvision(
    name: str, num_classes: int, in_channels: int, args: dict[str, Any]
) -> nn.Module:
    """A torchvision classifier without weights.

    Raises:
        ModelError: if it does not take an argument or reads another number of channels.
    """
    given = {"weights": None, "num_classes": num_classes, **_DEFAULTS.get(name, {}), **args}
    model = call_factory(name, torchvision.models.get_model_builder(name), given)
    _check_channels(name, model, in_channels)
    return model


def build_timm(name: str, num_classes: int, in_channels: int, args: dict[str, Any]) -> nn.Module:
    """A timm model without weights.

    Args:
        name: with its ``timm:`` prefix.
        num_classes: K.
        in_channels: C.
        args: further arguments of the model.

    Raises:
        ModelError: if timm is not installed, has no such model, or cannot build it.
    """
    timm, bare = find_timm(name)
    sizes = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    return call_factory(name, timm.create_model, {"model_name": bare, **sizes, **args})


def find_timm(name: str) -> tuple[ModuleType, str]:
    """timm, and the name of a model there.

    Raises:
        ModelError: if timm is not installed, or has no such model.
    """
    if importlib.util.find_spec("timm") is None:
        raise ModelError(f"model {name!r} needs timm, which is not installed: pip install timm")
    timm = importlib.import_module("timm")  # optional, so not at the top
    bare = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(bare):
        known = timm.list_models()
        near = get_close_matches(bare, known, _NEAR) or timm.list_models(f"{bare}*")
        others = ", ".join(near[:_NEAR]) or "none; timm.list_models() has all"
        raise ModelError(f"unknown timm model {bare!r}. There are of near names: {others}")
    return timm, bare


@dataclass(frozen=True)
class Published:
    """A published model's tensors by name, and how many classes it tells apart."""

    state: dict[str, Tensor]
    num_classes: int


def pretrained_timm(name: str) -> Published:
    """Download what timm publishes for a model (``timm:NAME`` or ``timm:NAME.TAG``).

    Raises:
        Exception: whatever timm and its hub client raise, for instance without a network.
    """
    timm = importlib.import_module("timm")
    model = timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=True)
    return Published(model.state_dict(), model.num_classes)


def _check_channels(name: str, model: nn.Module, in_channels: int) -> None:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != in_channels:
        raise ModelError(
            f"model {name!r} reads images of {first.in_channels} channels, but the data has "
            f"{in_channels}: read the data with --channels {first.in_channels}, or take one of "
            "the models that adapt, such as resnet20"
        )

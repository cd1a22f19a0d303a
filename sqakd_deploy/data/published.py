"""What is known of published weights: the preprocessing that they need, and their classes."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any

import torchvision

from sqakd_deploy.data.preprocessing import Preprocessing

_TIMM = "timm:"
_DEFAULT = "DEFAULT"


def published_preprocessing(model: str, weights: str | None) -> Preprocessing | None:
    """What torchvision or timm say of their own weights; nothing is fetched.

    Where they resize by a cubic filter (EfficientNet, vision transformers), images are resized
    linearly here.

    Args:
        model: a model of torchvision or timm; of others nothing is known.
        weights: the name of published weights, for instance ``DEFAULT``. Of a file nobody knows
            what its weights were trained with, whatever the network.

    Returns:
        Size, crop, mean and standard deviation, or None where they are not known.
    """
    if model.startswith(_TIMM):
        return _of_timm(model, weights)
    known = _torchvision(model, weights)
    if known is None:
        return None
    transforms = known.transforms()
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return Preprocessing(
        channels=3,
        input_size=(crop, crop),
        resize=resize,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def published_classes(model: str, weights: str | None) -> tuple[str, ...] | None:
    """Names of the classes that torchvision's own weights tell apart, where they are known.

    They are words (``tench``); folders of ImageNet are spelled otherwise (``n01440764``).

    Args:
        model: as for :func:`published_preprocessing`; timm names no classes.
        weights: as for :func:`published_preprocessing`.
    """
    known = _torchvision(model, weights)
    categories = None if known is None else known.meta["categories"]
    return tuple(categories) if categories else None  # weights of features alone have none


def _torchvision(model: str, weights: str | None) -> Any:
    name = model.removeprefix("torchvision:")
    if weights is None or name not in torchvision.models.list_models(module=torchvision.models):
        return None
    return torchvision.models.get_model_weights(name).__members__.get(weights)


def _of_timm(model: str, weights: str | None) -> Preprocessing | None:
    if weights != _DEFAULT or importlib.util.find_spec("timm") is None:
        return None
    timm = importlib.import_module("timm")  # optional, so not at the top
    known = timm.get_pretrained_cfg(model.removeprefix(_TIMM))
    if known is None:
        return None
    channels, height, width = known.input_size
    return Preprocessing(
        channels=channels,
        input_size=(height, width),
        resize=math.floor(min(height, width) / known.crop_pct),
        mean=tuple(known.mean),
        std=tuple(known.std),
    )

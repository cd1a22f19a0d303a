"""A float model from its name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from sqakd_deploy.errors import ModelError
from sqakd_deploy.models.builtin import MODELS
from sqakd_deploy.models.calling import call_factory
from sqakd_deploy.models.code import build_from_code, check_reference
from sqakd_deploy.models.zoo import (
    TIMM_PREFIX,
    TORCHVISION_PREFIX,
    build_timm,
    build_torchvision,
    find_timm,
    other_torchvision_names,
    torchvision_names,
)
from sqakd_deploy.registry import unknown_name

_CLOSE = 5  # torchvision names shown beside our own when a name is unknown


def build_model(
    name: str,
    *,
    num_classes: int | None,
    in_channels: int = 3,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: one of :data:`MODELS`, a torchvision classifier, ``timm:NAME``,
            ``FILE.py:FACTORY`` or ``PACKAGE.MODULE:FACTORY``. Where torchvision has a network of
            the name of one of ours, ``torchvision:NAME`` is theirs.
        num_classes: K, the number of logits; None for a person's own factory that needs none.
        in_channels: C of the images.
        args: further arguments of the model's factory, by name. A person's own factory is given
            ``num_classes`` and ``in_channels`` only if it has parameters of these names.

    Returns:
        A module that takes ``(N, C, H, W)`` and returns ``(N, K)``, in training mode.

    Raises:
        ModelError: if there is no such model, it cannot be built, does not take these arguments,
            or does not read images of C channels.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    given = dict(args or {})
    check_model(name)
    if is_code(name):
        known = {key: size for key, size in sizes.items() if size is not None}
        return build_from_code(name, known, given)
    if num_classes is None:
        raise ModelError(f"model {name!r}: wanted num_classes, got none")
    if name.startswith(TIMM_PREFIX):
        return build_timm(name, num_classes, in_channels, given)
    if name in MODELS:
        return call_factory(name, MODELS[name], {**sizes, **given})
    bare = name.removeprefix(TORCHVISION_PREFIX)
    return build_torchvision(bare, num_classes, in_channels, given)


def check_model(name: str) -> None:
    """Refuse a name that no model has, without building one or importing a person's code.

    Raises:
        ModelError: if there is no such model, or no such file.
    """
    if name.startswith(TIMM_PREFIX):
        find_timm(name)
    elif is_code(name):
        check_reference(name)
    elif name not in MODELS and name.removeprefix(TORCHVISION_PREFIX) not in torchvision_names():
        raise ModelError(_unknown(name))


def is_code(name: str) -> bool:
    """Whether a name refers to a person's own factory."""
    return ":" in name and not name.startswith((TIMM_PREFIX, TORCHVISION_PREFIX))


def list_models() -> list[str]:
    """Names of this package's networks, then those of torchvision's classifiers."""
    theirs = (TORCHVISION_PREFIX * (name in MODELS) + name for name in torchvision_names())
    return [*MODELS, *theirs]


def _unknown(name: str) -> str:
    if name.endswith(".py"):
        return f"model {name!r}: say which function builds the model, as in {name}:FACTORY"
    bare = name.removeprefix(TORCHVISION_PREFIX)
    close = difflib.get_close_matches(bare, torchvision_names(), n=_CLOSE)
    if bare in other_torchvision_names():
        parts = [known for known in torchvision_names() if known in bare]
        near = ", ".join(dict.fromkeys(parts + close)) or "see sqakd-deploy list models"
        return (
            f"model {name!r} of torchvision is no float classifier of images, and only those can "
            f"be distilled here. Classifiers of near names: {near}"
        )
    known = unknown_name("model", name, [*MODELS, *close])
    return (
        f"{known} Any torchvision classifier, timm:NAME, FILE.py:FACTORY and "
        "PACKAGE.MODULE:FACTORY are models too."
    )

"""Weights that torchvision and timm publish, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor, nn

from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.models.builtin import MODELS
from sqakd_deploy.models.weights import Message, load_state, read_state_dict
from sqakd_deploy.models.zoo import (
    TIMM_PREFIX,
    TORCHVISION_PREFIX,
    pretrained_timm,
    torchvision_names,
)

DEFAULT = "DEFAULT"
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")  # torchvision's spelling, as in IMAGENET1K_V1
_HASH = re.compile(r"-([a-f0-9]{8,})\.")  # torchvision's files carry the start of their SHA-256
_AUXILIARY = re.compile(r"(?:^|\.)(?:aux1|aux2|AuxLogits)\.")  # heads for training alone
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)")
_FILE_INSTEAD = "or name a file of the trained model's weights (--weights FILE)"


def load_any_weights(
    model: nn.Module,
    name: str,
    weights: str,
    *,
    new_classifier: bool = False,
    other_classes: bool = False,
    message: Message = lambda text: None,
) -> int | None:
    """Load the weights that a person names into ``model``, in place, whole or not at all.

    Args:
        model: from :func:`~sqakd_deploy.models.build_model`.
        name: of the model.
        weights: a file (:func:`~sqakd_deploy.models.load_weights`), or the name of published
            weights: ``DEFAULT``, or for torchvision also ``IMAGENET1K_V1`` and the like.
        new_classifier: where the weights tell another number of classes apart, leave the model's
            last layer as it is, to be trained.
        other_classes: they do so, whatever their number.
        message: told which was taken of several sets of weights in a file.

    Returns:
        That other number of classes; None where the weights are the whole model's.

    Raises:
        CheckpointError: if there is no such file or name, it cannot be downloaded, or it belongs
            to another model or another number of classes.
    """
    path = Path(weights).expanduser()
    last = _last_layer(model) if new_classifier else None
    if path.exists() or not _NAME.fullmatch(weights):
        state = read_state_dict(path, message)
        state = _modern(state, model) if _is_theirs(name) else state
    elif name.startswith(TIMM_PREFIX):
        state, path = _timm(model, name, weights, last)
    else:
        state, path = _torchvision(model, name, weights, last)
    return load_state(model, state, path, unless_resized=last, always=other_classes)


def check_weights(name: str, weights: str) -> None:
    """Refuse weights that are not there, before anything else is read; nothing is fetched.

    Args:
        name: of the model.
        weights: as for :func:`load_any_weights`.

    Raises:
        CheckpointError: if it is neither a file nor a name of published weights.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return
    if path.exists() or not _NAME.fullmatch(weights):
        read_state_dict(path)  # says what is wrong
    elif not name.startswith(TIMM_PREFIX):
        _published(name, weights)


def _torchvision(
    model: nn.Module, name: str, weights: str, replaced: str | None
) -> tuple[dict[str, Tensor], Path]:
    bare, chosen = name.removeprefix(TORCHVISION_PREFIX), _published(name, weights)
    if replaced is None:
        _check_classes(model, f"{weights} of {bare!r}", len(chosen.meta["categories"]))
    if getattr(model, "transform_input", None) is False:
        raise CheckpointError(
            f"weights {weights} of {bare!r} were trained on inputs that the model transforms: "
            "add --model-arg transform_input=true"
        )
    path = _download(chosen.url)
    return _modern(read_state_dict(path), model), path


def _published(name: str, weights: str) -> Any:
    """What torchvision knows of its weights by that name."""
    bare = name.removeprefix(TORCHVISION_PREFIX)
    if not _is_theirs(name):
        raise CheckpointError(
            f"weights {weights!r}: nobody publishes weights of {name!r} under a name, and there is "
            f"no file {weights}; leave --weights out to train a teacher, {_FILE_INSTEAD}"
        )
    known = torchvision.models.get_model_weights(bare).__members__
    if weights not in known:
        there = ", ".join(known) or "none"
        raise CheckpointError(
            f"torchvision has no weights {weights!r} of {bare!r}. There are: {there}; "
            f"choose one, {_FILE_INSTEAD}"
        )
    if not known[weights].meta["categories"]:
        raise CheckpointError(
            f"weights {weights} of {bare!r} hold its features alone, without a classifier; choose "
            f"others ({', '.join(name for name in known if name != weights)}), {_FILE_INSTEAD}"
        )
    return known[weights].value


def _is_theirs(name: str) -> bool:
    """Whether a model is torchvision's, not one of ours that has the same name."""
    return name not in MODELS and name.removeprefix(TORCHVISION_PREFIX) in torchvision_names()


def _modern(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names as today's torchvision has them, without heads that the model was built without."""
    has_heads = any(_AUXILIARY.search(key) for key in model.state_dict())
    kept = {k: value for k, value in state.items() if has_heads or not _AUXILIARY.search(k)}
    return {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in kept.items()}


def _download(url: str) -> Path:
    """The file in torch's cache, fetched if it is not there, and checked by its hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if path.is_file():
        return path
    expected = _HASH.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = expected[1] if expected else None
        torch.hub.download_url_to_file(url, str(path), prefix, progress=False)
    except (OSError, RuntimeError) as error:  # no network, no space; another hash
        raise CheckpointError(
            f"cannot download {url}: {error}. Copy that file to {path} from a machine that can, "
            f"{_FILE_INSTEAD}"
        ) from error
    return path


def _timm(
    model: nn.Module, name: str, weights: str, replaced: str | None
) -> tuple[dict[str, Tensor], Path]:
    if weights != DEFAULT:
        raise CheckpointError(
            f"weights {weights!r} of {name!r}: timm names its weights in the model, as in "
            f"{TIMM_PREFIX}resnet18.a1_in1k; write --weights {DEFAULT}, {_FILE_INSTEAD}"
        )
    try:
        published = pretrained_timm(name)
    except Exception as error:  # its hub client raises anything when there is no network
        raise CheckpointError(
            f"cannot download the weights of {name!r} through timm: "
            f"{type(error).__name__}: {error}; try again with a network, {_FILE_INSTEAD}"
        ) from error
    if replaced is None:
        _check_classes(model, f"{weights} of {name!r}", published.num_classes)
    return dict(published.state), Path(name)


def _check_classes(model: nn.Module, what: str, classes: int) -> None:
    """Refuse weights for another number of classes, before they are downloaded."""
    path = _last_layer(model)
    last = None if path is None else model.get_submodule(path)
    if not isinstance(last, (nn.Linear, nn.Conv2d)):
        return
    built = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    if built != classes:
        raise CheckpointError(
            f"weights {what} tell {classes} classes apart, but the model has {built}. Fine-tune "
            f"the float model on your {built} classes first, as sqakd-deploy teacher does from "
            f"these weights, and name its file (--weights FILE), or distil all {classes} classes "
            f"(--model-arg num_classes={classes})"
        )


def _last_layer(model: nn.Module) -> str | None:
    """Path of the classifier: the last layer with weights, if there is one."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = [path for path, layer in model.named_modules() if isinstance(layer, kinds)]
    return layers[-1] if layers else None

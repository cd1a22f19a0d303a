"""Device, images and float model, as a config says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sqakd_deploy.config import ModelConfig, RunConfig
from sqakd_deploy.data import ImageData, Preprocessing, load_data
from sqakd_deploy.errors import SpecError
from sqakd_deploy.listening import Listener, told
from sqakd_deploy.models import check_model, check_weights
from sqakd_deploy.origin import Origin
from sqakd_deploy.runs import build_float, keeping_of


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        SpecError: if a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError("device: wanted cuda, but torch sees no GPU; use --device cpu")
    use_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")


def check_there(config: ModelConfig) -> None:
    """Refuse a model or weights that are not there, which costs less than reading the images.

    Raises:
        ModelError: if there is no such model.
        CheckpointError: if there is no such file of weights.
    """
    check_model(config.name)
    if config.weights is not None:
        check_weights(config.weights)


def load(
    config: RunConfig,
    listener: Listener,
    *,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
) -> ImageData:
    """The images of a config.

    Args:
        config: its data.
        listener: hears of the progress.
        preprocessing: of the model that the images are for, where that is known.
        limit: at most so many of each part.

    Raises:
        DataError: if they cannot be read.
    """
    source = config.data
    data = load_data(
        source.source,
        input_size=source.input_size,
        channels=source.channels,
        mean=source.mean,
        std=source.std,
        skip_bad_images=source.skip_bad_images,
        progress=told(listener, "images"),
        preprocessing=preprocessing,
        augmentation=source.augmentation,
        keeping=keeping_of(source),
        message=listener.message,
        limit=limit,
    )
    listener.finish()
    if data.skipped:
        listener.message(f"skipped {len(data.skipped)} unreadable images: {_some(data.skipped)}")
    return data


def _some(names: tuple[str, ...], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def build(config: RunConfig, data: ImageData, origin: Origin) -> nn.Module:
    """The float model of a config, for these images.

    Args:
        config: its own ``num_classes`` wins over any other.
        data: the images.
        origin: of the weights; a run's number of classes wins over the images', which need not be
            of the same classes to distil on.

    Raises:
        SpecError: if the number of classes is unknown.
    """
    if origin.ours:
        classes = origin.num_classes or data.num_classes
    else:
        classes = data.num_classes or origin.num_classes
    return build_float(config.model, classes, data.preprocessing.channels)


def understood(
    config: RunConfig,
    data: ImageData,
    origin: Origin,
    num_classes: int,
    listener: Listener,
    *,
    labelled: bool,
) -> ImageData:
    """The images, without their labels where these mean something else to the model.

    Args:
        config: names weights, or none.
        data: the images.
        origin: of the weights.
        num_classes: that the model really tells apart.
        listener: told what is left out.
        labelled: the labels are needed.

    Raises:
        SpecError: if labels are needed, or there are no weights to bring other classes with them.
    """
    other = origin.difference(data, num_classes)
    if other is None:
        return data
    if labelled or config.model.weights is None:
        raise SpecError(
            f"labels: those of {data.name} mean something else to the model ({other}); leave "
            "num_classes out or let the model's factory take it, give other --data, or distil "
            "trained weights without labels (train --weights)"
        )
    listener.message(
        f"the model has other classes than {data.name} ({other}): labels would mean something "
        "else, so that agreement is reported, and no accuracy"
    )
    return data.without_labels()


def data_facts(data: ImageData, origin: Origin, num_classes: int) -> dict[str, Any]:
    """What a run keeps of its images, so that nobody needs them to use the student.

    Args:
        data: as understood by the model.
        origin: of the weights: its class names are the student's, too.
        num_classes: that the model tells apart.
    """
    classes = data.classes or origin.classes
    return {
        "name": data.name,
        "num_classes": num_classes,
        "classes": list(classes) if classes and len(classes) == num_classes else None,
        "preprocessing": data.preprocessing.model_dump(mode="json"),
    }

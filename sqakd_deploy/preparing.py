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
        check_weights(config.name, config.weights)


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
    if preprocessing is not None and source.channels not in (None, preprocessing.channels):
        raise SpecError(
            f"channels: the weights were trained on images of {preprocessing.channels}, got "
            f"{source.channels}; leave --channels out"
        )
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


def build(config: RunConfig, data: ImageData, origin: Origin) -> tuple[nn.Module, int | None]:
    """The float model of a config, for these images.

    Args:
        config: its own ``num_classes`` wins over any other.
        data: the images.
        origin: of the weights; a run's number of classes wins over the images', which need not be
            of the same classes to distil on.

    Returns:
        The model, and the number of classes that it was built for. A person's own factory may make
        another number of logits of it, or take none.

    Raises:
        SpecError: if the number of classes is unknown.
    """
    numbers = [data.num_classes, origin.num_classes]
    known = [number for number in numbers[:: -1 if origin.ours else 1] if number is not None]
    classes = config.model.args.get("num_classes") or (known[0] if known else None)
    return build_float(config.model, classes, data.preprocessing.channels), classes


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
            f"labels: those of {data.name} mean something else to the model ({other}); "
            + _what_helps(config)
        )
    listener.message(
        f"the model has other classes than {data.name} ({other}): labels would mean something "
        "else, so that agreement is reported, and no accuracy"
    )
    return data.without_labels()


def _what_helps(config: RunConfig) -> str:
    if "num_classes" in config.model.args:
        return "leave num_classes out"
    if config.model.weights is None:
        return "let the model's factory make a logit for each of num_classes"
    if config.distillation.loss != "kl":
        return "leave out --loss, which needs no label then, or give --data of the model's classes"
    return "give --data of the model's classes, or distil without labels: sqakd-deploy train"


def data_facts(
    data: ImageData, origin: Origin, num_classes: int, built_for: int | None
) -> dict[str, Any]:
    """What a run keeps of its images, so that nobody needs them to use the student.

    Args:
        data: as understood by the model.
        origin: of the weights: its class names are the student's, too.
        num_classes: that the model tells apart.
        built_for: the number that its factory was given.
    """
    classes = data.classes or origin.classes
    return {
        "name": data.name,
        "num_classes": num_classes,
        "built_for": built_for,
        "classes": list(classes) if classes and len(classes) == num_classes else None,
        "preprocessing": data.preprocessing.model_dump(mode="json"),
    }

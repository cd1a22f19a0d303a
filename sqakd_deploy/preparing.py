"""Device, images and float model, as a config says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sqakd_deploy.config import RunConfig
from sqakd_deploy.data import ImageData, Preprocessing, load_data
from sqakd_deploy.data.published import published_preprocessing
from sqakd_deploy.errors import SpecError
from sqakd_deploy.listening import Listener, told
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


def load(
    config: RunConfig,
    listener: Listener,
    *,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
) -> ImageData:
    """The images of a config.

    Args:
        config: its data, and its model for the preprocessing of published weights.
        listener: hears of the progress.
        preprocessing: what the images are for, where that is known.
        limit: at most so many of each part.

    Raises:
        DataError: if they cannot be read.
    """
    source = config.data
    published = published_preprocessing(config.model.name, config.model.weights)
    data = load_data(
        source.source,
        input_size=source.input_size,
        mean=source.mean,
        std=source.std,
        skip_bad_images=source.skip_bad_images,
        progress=told(listener, "images"),
        preprocessing=preprocessing or published,
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


def understood(
    config: RunConfig, data: ImageData, listener: Listener, *, labelled: bool
) -> ImageData:
    """The images, without their labels where these mean something else to the model.

    Args:
        config: its model may name a number of classes.
        data: the images.
        listener: told what is left out.
        labelled: the labels are needed.

    Raises:
        SpecError: if labels are needed, or there are no weights to bring other classes with them.
    """
    count = config.model.args.get("num_classes")
    if data.difference(None, count) is None:
        return data
    if labelled or config.model.weights is None:
        raise SpecError(
            f"num_classes: {data.name} has {data.num_classes} classes, got {count}; leave it out, "
            f"or distil weights for {count} without labels (--weights)"
        )
    listener.message(
        f"the model has {count} classes, {data.name} has {data.num_classes}: labels would mean "
        "something else, so that agreement is reported, and no accuracy"
    )
    return data.without_labels()


def build(config: RunConfig, data: ImageData) -> nn.Module:
    """The float model of a config, for these images.

    Raises:
        SpecError: if the number of classes is unknown.
    """
    return build_float(config.model, data.num_classes, data.preprocessing.channels)


def data_facts(data: ImageData, config: RunConfig) -> dict[str, Any]:
    """What a run keeps of its images, so that nobody needs them to use the student."""
    classes = config.model.args.get("num_classes") or data.num_classes
    return {
        "name": data.name,
        "num_classes": classes,
        "classes": list(data.classes) if data.classes else None,
        "preprocessing": data.preprocessing.model_dump(mode="json"),
    }

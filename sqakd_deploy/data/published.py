"""The preprocessing that published weights were trained with."""

from __future__ import annotations

import torchvision

from sqakd_deploy.data.preprocessing import Preprocessing


def published_preprocessing(model: str, weights: str | None) -> Preprocessing | None:
    """What torchvision says of its own weights; nothing is fetched.

    Where it resizes by a cubic filter (EfficientNet, vision transformers), images are resized
    linearly here.

    Args:
        model: a torchvision model; of others nothing is known.
        weights: the name of published weights, for instance ``DEFAULT``. Of a file nobody knows
            what its weights were trained with, whatever the network.

    Returns:
        Size, crop, mean and standard deviation, or None where they are not known.
    """
    name = model.removeprefix("torchvision:")
    if weights is None or name not in torchvision.models.list_models(module=torchvision.models):
        return None
    published = torchvision.models.get_model_weights(name)
    if weights not in published.__members__:
        return None
    transforms = published[weights].transforms()
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return Preprocessing(
        channels=3,
        input_size=(crop, crop),
        resize=resize,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )

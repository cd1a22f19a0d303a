"""Images that a person's own script already holds, and changes of size to any data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.decode import fit_images
from sqakd_deploy.data.options import ReadOptions
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.data.splits import (
    ImageData,
    ImageSplit,
    held_out,
    spread,
)
from sqakd_deploy.errors import DataError


def from_arrays(
    images: NDArray[np.uint8],
    labels: NDArray[Any] | None = None,
    *,
    test_images: NDArray[np.uint8] | None = None,
    test_labels: NDArray[Any] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    augmentation: Augmentation | None = None,
    name: str = "arrays",
) -> ImageData:
    """A data set from arrays.

    Args:
        images: training images, uint8 ``(N, C, H, W)`` or grayscale ``(N, H, W)``.
        labels: class indices ``(N,)``, or None.
        test_images: held-out images; None holds out every tenth of each class (of all images
            without labels), in their order.
        test_labels: class indices of ``test_images``.
        classes: class names by index; None takes the numbers.
        preprocessing: what the model was trained with; None takes the mean and standard
            deviation of the training images.
        augmentation: random changes in training; None makes none.
        name: shown in reports.

    Raises:
        DataError: if shapes, types or counts do not fit together.
    """
    train = ImageSplit(_four_axes(images), _as_labels(labels))
    if test_images is None:
        train, test = _hold_out(train)
    else:
        test = ImageSplit(_four_axes(test_images), _as_labels(test_labels))
    if (train.labels is None) != (test.labels is None):
        raise DataError("wanted labels for training and test images, or for neither")
    return ImageData(
        name=name,
        train=train,
        test=test,
        classes=_class_names(train, test, classes),
        preprocessing=preprocessing or measured(train.images),
        augmentation=augmentation or Augmentation(),
    )


def measured(images: NDArray[np.uint8]) -> Preprocessing:
    """Preprocessing with the mean and standard deviation of images ``(N, C, H, W)``."""
    per_channel = [images[:, c].astype(np.float64) / 255 for c in range(images.shape[1])]
    return Preprocessing(
        channels=images.shape[1],
        input_size=(images.shape[2], images.shape[3]),
        mean=tuple(round(float(channel.mean()), 4) for channel in per_channel),
        # Images of one colour have no spread; any divisor will do.
        std=tuple(round(float(channel.std()), 4) or 1.0 for channel in per_channel),
    )


def adapted(data: ImageData, options: ReadOptions) -> ImageData:
    """A data set at the size, channels, mean and std that a person asked for.

    Raises:
        SpecError: if an option is out of range.
    """
    preprocessing = data.preprocessing.changed(
        channels=options.channels,
        input_size=options.input_size,
        mean=options.mean,
        std=options.std,
    )
    return replace(
        data,
        train=_fitted(data.train, preprocessing, options.limit),
        test=_fitted(data.test, preprocessing, options.limit),
        preprocessing=preprocessing,
    )


def _fitted(split: ImageSplit, preprocessing: Preprocessing, limit: int | None) -> ImageSplit:
    kept = split if limit is None else split.take(spread(len(split), limit))
    images = fit_images(kept.images, preprocessing.channels, preprocessing.input_size)
    return ImageSplit(images, kept.labels)


def _hold_out(split: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    mask = held_out(len(split), split.labels)
    return split.take(np.flatnonzero(~mask)), split.take(np.flatnonzero(mask))


def _four_axes(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images[:, None] if images.ndim == 3 else images


def _as_labels(labels: NDArray[Any] | None) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels: wanted integers, got {labels.dtype}")
    return labels.astype(np.int64)


def _class_names(
    train: ImageSplit, test: ImageSplit, classes: Sequence[str] | None
) -> tuple[str, ...] | None:
    if train.labels is None or test.labels is None:
        return None
    count = 1 + max(int(part.max(initial=-1)) for part in (train.labels, test.labels))
    if classes is None:
        return tuple(str(index) for index in range(count))
    if len(classes) < count:
        raise DataError(f"labels go up to {count - 1}, but there are {len(classes)} class names")
    return tuple(classes)

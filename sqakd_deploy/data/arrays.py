"""Images that a person's own script already holds, and changes of size to any data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.decode import fit_images
from sqakd_deploy.data.fitted import FittedImages
from sqakd_deploy.data.images import Images
from sqakd_deploy.data.options import ReadOptions
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing, chosen_augmentation
from sqakd_deploy.data.splits import (
    ImageData,
    ImageSplit,
    held_out,
    spread,
)
from sqakd_deploy.errors import DataError

_MEASURED = 10_000  # images
_GIB = 1 << 30
_MEMORY = 1 * _GIB  # of each part; more is not resized into memory


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
        images: training images, uint8 ``(N, C, H, W)`` with C of 1 or 3, or grayscale
            ``(N, H, W)``. A tensor is as good as an array, here and below.
        labels: class indices ``(N,)``, a list or an array, or None.
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
    train = ImageSplit(_as_images(images, "images"), _as_labels(labels, "labels"))
    if test_images is None:
        if test_labels is not None:
            raise DataError("test_labels: wanted test_images with them; give both, or neither")
        train, test = _hold_out(train)
    else:
        held = _as_images(test_images, "test_images")
        test = ImageSplit(held, _as_labels(test_labels, "test_labels"))
    if not len(train):
        raise DataError(f"{name}: wanted images to train on, got none")
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


def measured(images: Images) -> Preprocessing:
    """Preprocessing with the mean and standard deviation of images ``(N, C, H, W)``.

    They are taken over at most 10,000 images, evenly spread: enough for the fourth decimal, and
    more would be read from a disk for nothing.
    """
    sample = images[spread(len(images), _MEASURED)]
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(sample.shape[1]):
        share = np.bincount(sample[:, channel].ravel(), minlength=256) / sample[:, channel].size
        mean = float(share @ values)
        means.append(round(mean, 4))
        # Images of one colour have no spread; any divisor will do.
        stds.append(round(float(np.sqrt(share @ (values - mean) ** 2)), 4) or 1.0)
    _, channels, height, width = images.shape
    return Preprocessing(
        channels=channels, input_size=(height, width), mean=tuple(means), std=tuple(stds)
    )


def adapted(data: ImageData, options: ReadOptions) -> ImageData:
    """A data set as a person asked for it.

    Raises:
        SpecError: if an option is out of range.
    """
    own = data.preprocessing
    preprocessing = options.changed(own)
    usual = data.augmentation.at(min(preprocessing.input_size) / min(own.input_size))
    return replace(
        data,
        train=_fitted(data.train, preprocessing, options),
        test=_fitted(data.test, preprocessing, options),
        preprocessing=preprocessing,
        augmentation=chosen_augmentation(options.augmentation, usual, preprocessing),
    )


def _fitted(split: ImageSplit, preprocessing: Preprocessing, options: ReadOptions) -> ImageSplit:
    limit, workers = options.limit, options.keeping.worker_count
    kept = split if limit is None else split.take(spread(len(split), limit))
    channels, size = preprocessing.channels, preprocessing.stored_size
    fitted = FittedImages(kept.images, channels, size, workers=workers)
    if kept.images.shape == fitted.shape or fitted.nbytes <= _MEMORY:
        return ImageSplit(fit_images(kept.images, channels, size), kept.labels)
    options.message(
        f"{len(kept)} images of {size[0]}×{size[1]} pixels are {fitted.nbytes / _GIB:.3g} GiB, too "
        f"much for memory: {workers or 'no'} worker processes resize them when they are read"
    )
    return ImageSplit(fitted, kept.labels)


def _hold_out(split: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    mask = held_out(len(split), split.labels)
    return split.take(np.flatnonzero(~mask)), split.take(np.flatnonzero(mask))


def _as_array(values: Any, what: str) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # of a GPU, with gradients, ragged
        raise DataError(
            f"{what}: wanted an array, got a {type(values).__name__}: {error}"
        ) from error


def _as_images(images: NDArray[np.uint8], what: str) -> NDArray[np.uint8]:
    array = _as_array(images, what)
    array = array[:, None] if array.ndim == 3 else array
    if array.ndim == 4 and array.shape[1] not in (1, 3):
        last = array.shape[3] in (1, 3)
        remedy = "; channels come last: give images.transpose(0, 3, 1, 2)" if last else ""
        raise DataError(
            f"{what}: wanted 1 or 3 channels, as (N, C, H, W), got shape {array.shape}{remedy}"
        )
    return array


def _as_labels(labels: NDArray[Any] | None, what: str) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    array = _as_array(labels, what)
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{what}: wanted integers, got {array.dtype}")
    return array.astype(np.int64)


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

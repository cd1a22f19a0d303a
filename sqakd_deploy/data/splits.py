"""Images, with their labels kept apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.images import Images
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.errors import DataError

_LOOKED_AT = 64  # images of each part that stand for all
_EVERY = 10  # a split made here holds out one image in so many


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and, behind their own attribute, labels.

    Label-free training is handed ``images`` and nothing else.

    Attributes:
        images: uint8 ``(N, C, H, W)``: an array, a memory map, or made when indexed.
        labels: class indices int64 ``(N,)``, or None if nobody labelled the images.
    """

    images: Images
    labels: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise DataError(
                "images: wanted uint8 of shape (N, C, H, W), "
                f"got {self.images.dtype} of shape {self.images.shape}"
            )
        if self.labels is not None:
            _check_labels(self.labels, len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[np.intp]) -> ImageSplit:
        """The images (and labels) at some indices ``(M,)``, in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSplit(self.images[indices], labels)

    def need_labels(self) -> NDArray[np.int64]:
        """The labels, for supervised training and for scores.

        Raises:
            DataError: if there are none.
        """
        if self.labels is None:
            raise DataError(
                "these images have no labels, which supervised training and scores need: give a "
                "tree of class folders; a trained model is distilled without (train --loss kl)"
            )
        return self.labels


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set, ready to train on and to report on.

    Attributes:
        name: of the data set, or the folder's path.
        train: images to learn from.
        test: images held out for reports.
        classes: class names by index, or None without labels.
        preprocessing: what a model must be given.
        augmentation: what suits these images in training.
        skipped: files that could not be read, in order; empty unless skipping was asked for.
        whole: all images, where the two parts were made here; None where the data came in parts.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    augmentation: Augmentation = field(default_factory=Augmentation)
    skipped: tuple[str, ...] = ()
    whole: ImageSplit | None = None

    def __post_init__(self) -> None:
        for split, part in (("train", self.train), ("test", self.test)):
            if len(part) == 0:
                raise DataError(f"{self.name}: no image is left in the {split} part")
            self.preprocessing.check_stored(part.images)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return None if self.classes is None else len(self.classes)

    @property
    def checksum(self) -> int:
        """CRC-32 of all labels and of some images, evenly spread.

        Images that come, go or change places change it; of one alone that is drawn over it need
        not tell, since not all are looked at.
        """
        total = 0
        for part in (self.train, self.test):
            some = np.ascontiguousarray(part.images[spread(len(part), _LOOKED_AT)])
            total = zlib.crc32(some.data, zlib.crc32(repr(part.images.shape).encode(), total))
            if part.labels is not None:
                total = zlib.crc32(np.ascontiguousarray(part.labels).data, total)
        return total

    def difference(self, names: Sequence[str] | None, count: int | None = None) -> str | None:
        """How these classes differ from a model's, so that a label would mean something else.

        Args:
            names: of the model's classes, in their order, where known.
            count: of its classes, where known.

        Returns:
            The first difference in words; None if there is none as far as is known.
        """
        if names and self.classes:
            for theirs, ours in zip(names, self.classes, strict=False):
                if theirs != ours:
                    return f"{theirs!r} against {ours!r}"
            count = len(names)
        if count and self.num_classes not in (None, count):
            return f"{count} classes against {self.num_classes}"
        return None

    def without_labels(self) -> ImageData:
        """The images alone."""
        train, test = (ImageSplit(part.images, None) for part in (self.train, self.test))
        whole = None if self.whole is None else ImageSplit(self.whole.images, None)
        return replace(self, train=train, test=test, classes=None, whole=whole)


def held_out(count: int, labels: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
    """Which of ``count`` images, in their order, are held out: the last of every ten.

    With labels ``(N,)`` this is done within each class. At least one of each class (or of all)
    is held out when there are two or more, none of a single one. No random numbers are involved,
    so the same images are held out on every machine and in every version.
    """
    groups = np.zeros(count, np.int64) if labels is None else labels
    mask = np.zeros(count, np.bool_)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        mask[members[_EVERY - 1 :: _EVERY]] = True
        if 2 <= len(members) < _EVERY:
            mask[members[-1]] = True
    return mask


def spread(count: int, limit: int | None) -> NDArray[np.intp]:
    """Indices of at most ``limit`` of ``count`` images, evenly spread over their order.

    Class folders are read one after the other, so the first few would all be of one class.
    """
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.intp)
    return np.arange(limit, dtype=np.intp) * count // limit


def _check_labels(labels: NDArray[np.int64], count: int) -> None:
    if labels.dtype != np.int64 or labels.shape != (count,):
        raise DataError(
            f"labels: wanted int64 of shape ({count},), one for each image, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if count and labels.min() < 0:
        raise DataError(f"labels: wanted class indices from 0, got {labels.min()}")

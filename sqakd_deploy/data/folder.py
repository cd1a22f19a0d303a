"""A person's own images: a tree of class folders, or a flat folder without labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sqakd_deploy.data.decode import Decoded, decode_files
from sqakd_deploy.data.layout import Listing, find_splits
from sqakd_deploy.data.options import ReadOptions
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.data.splits import ImageData, ImageSplit
from sqakd_deploy.errors import DataError

_PHOTO_SIZE = (224, 224)
_SMALL = 96  # pixels; images up to this size, all of one size, are taken as they are
_SAMPLE = 64  # files whose headers are looked at
_GRAYSCALE = ("1", "L", "LA", "I", "I;16")

# The usual values for photographs, over ImageNet's training images.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_folder(path: Path, options: ReadOptions | None = None) -> ImageData:
    """Read images from a folder; :mod:`sqakd_deploy.data.layout` says how it may be laid out.

    Without a wish in ``options``, images that are all of one size up to 96 pixels keep it and
    others become 224×224; they are RGB unless all are grayscale; mean and standard deviation are
    ImageNet's. The header of 64 files, evenly spread, decides.

    Args:
        path: the folder.
        options: size, channels, mean and std; what to do with files that cannot be decoded.

    Raises:
        DataError: if the folder is missing, empty or laid out otherwise, or an image is corrupt.
        SpecError: if an option is out of range.
    """
    options = options or ReadOptions()
    train, test = (part.limited(options.limit) for part in find_splits(path))
    paths = [*train.paths, *test.paths]
    preprocessing = _preprocessing(paths, options)
    decoded = decode_files(
        paths,
        preprocessing.channels,
        preprocessing.input_size,
        skip_bad=options.skip_bad_images,
        progress=options.progress,
    )
    if not len(decoded.images):
        raise DataError(f"none of the {len(paths)} images in {path} can be read")
    train_split, test_split = _split(decoded, train, test)
    return ImageData(
        name=str(path),
        train=train_split,
        test=test_split,
        classes=train.classes,
        preprocessing=preprocessing,
        augmentation=_augmentation(preprocessing),
        skipped=tuple(str(bad) for bad in decoded.bad),
    )


def _split(decoded: Decoded, train: Listing, test: Listing) -> tuple[ImageSplit, ImageSplit]:
    good_train, good_test = np.split(decoded.good, [len(train.paths)])
    images_train, images_test = np.split(decoded.images, [int(good_train.sum())])
    return (
        ImageSplit(images_train, _labels(train, good_train)),
        ImageSplit(images_test, _labels(test, good_test)),
    )


def _labels(part: Listing, good: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    return None if part.labels is None else part.labels[good]


def _augmentation(preprocessing: Preprocessing) -> Augmentation:
    """Shifts by an eighth, as on CIFAR; grayscale is often text or digits: no mirroring."""
    shift = min(preprocessing.input_size) // 8
    return Augmentation(shift=shift, flip=preprocessing.channels == 3)


def _preprocessing(paths: list[Path], options: ReadOptions) -> Preprocessing:
    seen = _Seen.of(paths)
    photos = Preprocessing(
        channels=3, input_size=seen.own_size, mean=_IMAGENET_MEAN, std=_IMAGENET_STD
    )
    return photos.changed(
        channels=options.channels or seen.own_channels,
        input_size=options.input_size,
        mean=options.mean,
        std=options.std,
    )


@dataclass(frozen=True)
class _Seen:
    """What the headers of a few files say.

    Attributes:
        sizes: the (height, width) that occur.
        modes: the Pillow modes that occur.
    """

    sizes: frozenset[tuple[int, int]]
    modes: frozenset[str]

    @classmethod
    def of(cls, paths: list[Path]) -> _Seen:
        headers = [_header(path) for path in paths[:: max(1, len(paths) // _SAMPLE)]]
        found = [header for header in headers if header is not None]
        return cls(frozenset(size for size, _ in found), frozenset(mode for _, mode in found))

    @property
    def own_size(self) -> tuple[int, int]:
        """The images' own size if it is one and small, else that of photographs."""
        if len(self.sizes) == 1:
            (size,) = self.sizes
            return size if max(size) <= _SMALL else _PHOTO_SIZE
        return _PHOTO_SIZE

    @property
    def own_channels(self) -> int:
        """1 if all are grayscale, else 3."""
        return 1 if self.modes and self.modes <= set(_GRAYSCALE) else 3


def _header(path: Path) -> tuple[tuple[int, int], str] | None:
    """Size and mode without decoding; None leaves a corrupt file for the decoder to report."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None

"""A person's own images: a tree of class folders, or a flat folder without labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sqakd_deploy.data.decode import UNREADABLE, Decoded
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.layout import Listing, find_splits, is_divided
from sqakd_deploy.data.options import ReadOptions
from sqakd_deploy.data.preprocessing import (
    Augmentation,
    Preprocessing,
    chosen_augmentation,
    named_augmentation,
)
from sqakd_deploy.data.splits import ImageData, ImageSplit
from sqakd_deploy.data.storage import read_images

_PHOTO_SIZE = (224, 224)
_SMALL = 96  # pixels; images up to this size, all of one size, are taken as they are
_SAMPLE = 64  # files whose headers are looked at
_GRAYSCALE = ("1", "L", "LA")
_LYING = (5, 6, 7, 8)  # EXIF orientations of images that are stored on their side

_PHOTO_RESIZE = 256
_WORDNET = re.compile(r"n\d{8}")

# The usual values for photographs, over ImageNet's training images.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_folder(path: Path, options: ReadOptions | None = None) -> ImageData:
    """Read images from a folder; :mod:`sqakd_deploy.data.layout` says how it may be laid out.

    Without a wish in ``options``, images that are all of one size up to 96 pixels keep it and
    others become 224×224; they are RGB unless all are grayscale; mean and standard deviation are
    ImageNet's, of grayscale their averages. The header of 64 files, evenly spread, decides.

    Args:
        path: the folder.
        options: size, channels, mean and std; what to do with files that cannot be decoded.

    Raises:
        DataError: if the folder is missing, empty or laid out otherwise, or an image is corrupt.
        SpecError: if an option is out of range.
    """
    options = options or ReadOptions()
    train, test = find_splits(path, options.message)
    return read_parts(path, train, test, options, divided=is_divided(path))


def read_parts(
    path: Path,
    train: Listing,
    test: Listing,
    options: ReadOptions,
    *,
    name: str | None = None,
    own: Preprocessing | None = None,
    augmentation: Augmentation | None = None,
    divided: bool = True,
) -> ImageData:
    """The images of two listings as a data set.

    Args:
        path: the folder that holds all files.
        train: to learn from.
        test: held out for reports.
        options: a person's wishes.
        name: of the data set; None is the path.
        own: the data set's preprocessing; None looks at the files.
        augmentation: what suits the images in training; None decides by their kind.
        divided: the two parts are the data's own.

    Raises:
        DataError: if an image is corrupt.
        SpecError: if an option is out of range.
    """
    train, test = (part.limited(options.limit) for part in (train, test))
    paths = [*train.paths, *test.paths]
    seen = _Seen.of(paths)
    preprocessing = options.changed(own or seen.preprocessing(options, is_imagenet(train.classes)))
    files = ImageFiles(path, paths, preprocessing.channels, seen.stored(preprocessing))
    decoded = read_images(files, options)
    if own is None and options.preprocessing is None:
        _say_what_is_assumed(options, preprocessing, seen.sizes)
    train_split, test_split = _split(decoded, train, test)
    usual = augmentation or _augmentation(
        preprocessing, is_imagenet(train.classes), grey=seen.own_channels == 1
    )
    return ImageData(
        name=name or str(path),
        train=train_split,
        test=test_split,
        classes=train.classes,
        preprocessing=preprocessing,
        augmentation=chosen_augmentation(options.augmentation, usual, preprocessing),
        skipped=tuple(str(bad) for bad in decoded.bad),
        whole=None if divided else _whole(decoded, train_split, test_split),
    )


def _say_what_is_assumed(
    options: ReadOptions, preprocessing: Preprocessing, sizes: frozenset[tuple[int, int]]
) -> None:
    """Numbers that nobody gave, which a model trained on others would suffer from."""
    if options.input_size is None and sizes != {preprocessing.input_size}:
        height, width = preprocessing.input_size
        how = "cropped about their centre and resized to"
        if preprocessing.resize is not None:
            how = f"resized to {preprocessing.resize} pixels on their short side and cropped to"
        options.message(f"images are {how} {height}×{width} pixels (--input-size)")
    given = {"mean": options.mean, "std": options.std}
    assumed = [name for name, values in given.items() if values is None]
    if assumed:
        flags = ", ".join(f"--{name}" for name in assumed)
        options.message(f"images are normalised by ImageNet's {' and '.join(assumed)} ({flags})")


def _split(decoded: Decoded, train: Listing, test: Listing) -> tuple[ImageSplit, ImageSplit]:
    good_train, good_test = np.split(decoded.good, [len(train.paths)])
    count = int(good_train.sum())
    return (
        ImageSplit(decoded.images[:count], _labels(train, good_train)),
        ImageSplit(decoded.images[count:], _labels(test, good_test)),
    )


def _whole(decoded: Decoded, train: ImageSplit, test: ImageSplit) -> ImageSplit:
    if train.labels is None or test.labels is None:
        return ImageSplit(decoded.images)
    return ImageSplit(decoded.images, np.concatenate([train.labels, test.labels]))


def _labels(part: Listing, good: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    return None if part.labels is None else part.labels[good]


def _augmentation(preprocessing: Preprocessing, imagenet: bool, *, grey: bool) -> Augmentation:
    """Shifts by an eighth, as on CIFAR; grayscale is often text or digits: no mirroring."""
    if imagenet and min(preprocessing.input_size) > _SMALL:
        return named_augmentation("imagenet", preprocessing.input_size)
    cifar = named_augmentation("cifar", preprocessing.input_size)
    return Augmentation(shift=cifar.shift) if grey else cifar


def is_imagenet(classes: tuple[str, ...] | None) -> bool:
    """Whether classes are named as ImageNet's are, by WordNet numbers."""
    return bool(classes) and all(_WORDNET.fullmatch(name) for name in classes or ())


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

    def preprocessing(self, options: ReadOptions, imagenet: bool) -> Preprocessing:
        """Size and channels as in the files or as wished, mean and deviation of photographs."""
        photos = Preprocessing(
            channels=3,
            input_size=self.own_size,
            resize=_PHOTO_RESIZE if imagenet and self.own_size == _PHOTO_SIZE else None,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
        # A wish comes first: of grey images as RGB, each channel keeps its own mean.
        return photos.changed(channels=options.channels or self.own_channels)

    def stored(self, preprocessing: Preprocessing) -> tuple[int, int]:
        """Height and width to keep the images at.

        Small images that are to be enlarged and cropped are kept as they are, which takes less
        room and leaves random crops all there is.
        """
        height, width = preprocessing.stored_size
        if preprocessing.resize is not None and len(self.sizes) == 1:
            (own,) = self.sizes
            if own[0] <= height and own[0] * width == own[1] * height:
                return own
        return height, width

    @property
    def own_channels(self) -> int:
        """1 if all are grayscale, else 3."""
        grey = [mode in _GRAYSCALE or mode.startswith("I") for mode in self.modes]  # I;16B, too
        return 1 if grey and all(grey) else 3


def _header(path: Path) -> tuple[tuple[int, int], str] | None:
    """Size, upright, and mode; None leaves a corrupt file for the decoder to report."""
    try:
        with Image.open(path) as image:
            size = image.height, image.width
            lies = image.getexif().get(ExifTags.Base.Orientation) in _LYING
            return size[::-1] if lies else size, image.mode
    except UNREADABLE:
        return None

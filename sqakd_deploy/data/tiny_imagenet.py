"""Tiny-ImageNet in its own layout.

::

    tiny-imagenet-200/wnids.txt                         one WordNet number a line: the classes
                      words.txt                         number, tab, names
                      train/<number>/images/*.JPEG
                      val/images/*.JPEG
                      val/val_annotations.txt           file, tab, number, tab, a box
                      test/images/*.JPEG                without labels; not read

Classes are numbered in the order of their WordNet numbers, as folders' names would be, not in
that of ``wnids.txt``: so are those of published checkpoints.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from sqakd_deploy.data.folder import IMAGENET_MEAN, IMAGENET_STD, read_parts
from sqakd_deploy.data.layout import Listing, images_below
from sqakd_deploy.data.options import ReadOptions, cache_folder
from sqakd_deploy.data.preprocessing import Preprocessing, named_augmentation
from sqakd_deploy.data.splits import ImageData
from sqakd_deploy.errors import DataError

FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = Path("val", "val_annotations.txt")
_ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

# As SQAKD trains and tests on it: enlarged to the size of ImageNet's images.
_PREPROCESSING = Preprocessing(
    channels=3, input_size=(224, 224), resize=256, mean=IMAGENET_MEAN, std=IMAGENET_STD
)


def load_tiny_imagenet(root: Path | None = None, options: ReadOptions | None = None) -> ImageData:
    """100,000 training and 10,000 test images of 200 classes, kept at 64×64, given at 224×224.

    Args:
        root: ``tiny-imagenet-200`` or the folder that holds it; None is the cache.
        options: a person's wishes.

    Raises:
        DataError: if the folder is not there, or is not laid out as published.
        SpecError: if an option is out of range.
    """
    folder = root or cache_folder()
    places = (folder, folder / FOLDER)
    for place in places:
        if is_tiny_imagenet(place):
            return read_tiny_imagenet(place, options, name="tiny-imagenet")
    raise DataError(
        f"tiny-imagenet is not there: looked for {_ANNOTATIONS} and wnids.txt in "
        f"{' and '.join(map(str, places))}. Fetch {_ADDRESS} and unpack it in {folder}, or give "
        f"the folder that it is in: --data path/to/{FOLDER}"
    )


def is_tiny_imagenet(path: Path) -> bool:
    """Whether a folder is laid out as Tiny-ImageNet."""
    return (path / "wnids.txt").is_file() and (path / _ANNOTATIONS).is_file()


def read_tiny_imagenet(
    path: Path, options: ReadOptions | None = None, *, name: str | None = None
) -> ImageData:
    """Read a folder of that layout.

    Args:
        path: the folder.
        options: a person's wishes.
        name: of the data set; None is the path.

    Raises:
        DataError: if the folder is not laid out as published, or an image is corrupt.
        SpecError: if an option is out of range.
    """
    numbers = tuple(sorted(_lines(path / "wnids.txt")))
    classes = _names(numbers, path / "words.txt")
    train = [
        (image, number) for number in numbers for image in images_below(path / "train" / number)
    ]
    return read_parts(
        path,
        _listing(train, numbers, classes, path / "train"),
        _listing(_validation(path, numbers), numbers, classes, path / "val"),
        options or ReadOptions(),
        name=name,
        own=_PREPROCESSING,
        augmentation=named_augmentation("imagenet", _PREPROCESSING.input_size),
    )


def _listing(
    pairs: list[tuple[Path, str]], numbers: tuple[str, ...], classes: tuple[str, ...], where: Path
) -> Listing:
    if not pairs:
        raise DataError(f"no images in {where}")
    index = {number: position for position, number in enumerate(numbers)}
    labels = np.array([index[number] for _, number in pairs], np.int64)
    return Listing(tuple(image for image, _ in pairs), labels, classes)


def _validation(path: Path, numbers: tuple[str, ...]) -> list[tuple[Path, str]]:
    pairs, known = [], set(numbers)
    for row, line in enumerate(_lines(path / _ANNOTATIONS), 1):
        file, _, rest = line.partition("\t")
        number = rest.partition("\t")[0]
        if number not in known:
            raise DataError(
                f"{path / _ANNOTATIONS}, line {row}: wanted a file and a number of wnids.txt with "
                f"a tab between them, got {line!r}"
            )
        pairs.append((path / "val" / "images" / file, number))
    return sorted(pairs)


def _names(numbers: tuple[str, ...], words: Path) -> tuple[str, ...]:
    """The first name of each class; all its names where two classes share the first."""
    if not words.is_file():
        return numbers
    rows = (line.partition("\t") for line in _lines(words))
    known = {number: names for number, _, names in rows}
    full = [known.get(number, number) for number in numbers]
    first = [names.partition(",")[0].strip() for names in full]
    shared, twins = Counter(first), Counter(full)
    return tuple(
        short if shared[short] == 1 else names if twins[names] == 1 else f"{names} ({number})"
        for short, names, number in zip(first, full, numbers, strict=True)
    )


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return [line.rstrip() for line in text.splitlines() if line.strip()]

"""Which files of a folder are images, of which class, and held out or not.

Layouts, tried in this order:

1. ``PATH/train/…`` beside ``PATH/test/…``, each with one folder a class, or each flat without
   labels. ``training`` is as good a name, and ``testing``, ``val``, ``validation`` or ``valid`` is,
   in any letter case; ImageNet's ``ILSVRC2012_img_train``, ``ILSVRC2012_img_val`` and
   ``ILSVRC/Data/CLS-LOC`` are known, too. Of several test parts the first counts, or if ``train``
   has classes the first that has some of them. One part alone is read by the rules below.
2. ``PATH/<class>/…``, two or more class folders, in which images may be nested. Without a training
   part, ``test`` beside others is a class.
3. ``PATH/*.jpg``, flat, or all within a single folder: no labels.

Where no test part is given, every tenth image of each class (or of the flat folder), in the order
of the paths, is held out for reports; at least one of each class with two images.

Classes are numbered in the order of their folders' names. Hidden files and folders, ``__MACOSX``,
named pipes and files that are no images by their extension are ignored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.options import Message
from sqakd_deploy.data.splits import held_out, spread
from sqakd_deploy.errors import DataError

EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
_TRAIN_NAMES = ("train", "training", "ilsvrc2012_img_train")
_TEST_NAMES = ("test", "testing", "val", "validation", "valid", "ilsvrc2012_img_val")
_INNER = (Path("ILSVRC", "Data", "CLS-LOC"), Path("Data", "CLS-LOC"))
_JUNK = "__MACOSX"


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files of one part of a data set.

    Attributes:
        paths: N files.
        labels: class indices int64 ``(N,)``, or None.
        classes: names of the classes, or None.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None

    def take(self, indices: NDArray[np.intp]) -> Listing:
        """The files at some indices ``(M,)``."""
        labels = None if self.labels is None else self.labels[indices]
        return Listing(tuple(self.paths[i] for i in indices), labels, self.classes)

    def limited(self, limit: int | None) -> Listing:
        """At most ``limit`` files, evenly spread."""
        return self.take(spread(len(self.paths), limit))


def find_splits(path: Path, message: Message = lambda text: None) -> tuple[Listing, Listing]:
    """The training and the test files of a folder.

    Args:
        path: the folder.
        message: told of images that are left out.

    Raises:
        DataError: if the folder is missing, holds no images, or is laid out otherwise.
    """
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"data folder {path} {what}; name a folder of images, or a data set of those that "
            "`sqakd-deploy list datasets` shows"
        )
    path = _inner(path)
    trains, tests = _parts(path)
    if not (trains and tests):
        return _hold_out(_list(_undivided(path, trains, tests), message))
    train = _list(trains[0], message)
    chosen = _test_of(train, tests)
    test = _list(chosen, message, min_classes=1 if train.classes else 2)
    return train, _with_classes_of(train, test, chosen)


def is_divided(path: Path) -> bool:
    """Whether a folder has a test part of its own, so that none is held out here."""
    return all(_parts(_inner(path)))


def _parts(path: Path) -> tuple[list[Path], list[Path]]:
    """Folders named as training parts are, and those named as test parts."""
    folders = _entries(path)[1]
    return _named(folders, _TRAIN_NAMES), _named(folders, _TEST_NAMES)


def _inner(path: Path) -> Path:
    """Where the images of ImageNet are in the archives of its challenges."""
    for inner in _INNER:
        if (path / inner).is_dir():
            return path / inner
    return path


def _named(folders: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The folders of these names in any letter case, in the order of the names."""
    return [folder for name in names for folder in folders if folder.name.lower() == name]


def _undivided(path: Path, trains: list[Path], tests: list[Path]) -> Path:
    """The folder of all images where no two parts are given."""
    parts = trains or tests
    if not parts:
        return path
    flat, folders = _entries(path)
    beside = [other.name for other in folders if other not in parts and images_below(other)]
    if trains:
        if beside and not _entries(trains[0])[1]:
            raise DataError(
                f"{path} holds {trains[0].name}, flat, beside {', '.join(beside[:5])}: a training "
                "part, or one class of several? Move the others away, or all class folders into a "
                "folder train"
            )
        return trains[0]
    if flat or beside:
        return path
    if len(tests) > 1:
        names = " and ".join(folder.name for folder in tests)
        raise DataError(
            f"{path} holds {names}, but no training part; wanted train beside them, or one of "
            f"them alone: give {tests[0]}, for instance"
        )
    return tests[0]


def _test_of(train: Listing, tests: list[Path]) -> Path:
    """Of several test parts, the one with the training part's classes.

    ImageNet's own test part has no labels, but its validation part has. Tiny-ImageNet's has a
    folder that is no class.
    """
    classes = set(train.classes or ())
    known = (test for test in tests if classes & {folder.name for folder in _entries(test)[1]})
    return next(known, tests[0])


def _list(folder: Path, message: Message, *, min_classes: int = 2) -> Listing:
    """Images of one part; fewer class folders than ``min_classes`` are taken as none."""
    flat, folders = _entries(folder)
    by_class = {sub.name: images_below(sub) for sub in folders}
    by_class = {name: paths for name, paths in by_class.items() if paths}
    if flat and len(by_class) >= min_classes:
        raise DataError(
            f"{folder} holds {len(flat)} images beside {len(by_class)} folders of images; "
            "wanted one folder a class, or images only. Move one or the other away"
        )
    if len(by_class) >= min_classes:
        return _labelled(by_class)
    paths = tuple(flat) or tuple(path for paths in by_class.values() for path in paths)
    if not paths:
        raise DataError(f"no images in {folder}; searched for {', '.join(EXTENSIONS)}")
    left_out = sum(map(len, by_class.values())) if flat else 0
    if left_out:
        message(
            f"{folder}: {left_out} images in {len(by_class)} subfolder are left out, beside "
            f"{len(flat)} that lie in the folder itself"
        )
    return Listing(paths)


def _labelled(by_class: dict[str, list[Path]]) -> Listing:
    labels = [index for index, paths in enumerate(by_class.values()) for _ in paths]
    paths = tuple(path for paths in by_class.values() for path in paths)
    return Listing(paths, np.array(labels, dtype=np.int64), tuple(by_class))


def _hold_out(listing: Listing) -> tuple[Listing, Listing]:
    if len(listing.paths) < 2:
        raise DataError(
            f"wanted at least 2 images, one of them held out, found only {listing.paths[0]}"
        )
    mask = held_out(len(listing.paths), listing.labels)
    return listing.take(np.flatnonzero(~mask)), listing.take(np.flatnonzero(mask))


def _with_classes_of(train: Listing, test: Listing, folder: Path) -> Listing:
    """Number the test images' classes as in training; a test part may lack some of them."""
    if train.classes is None:
        return Listing(test.paths)
    if test.labels is None or not set(test.classes or ()) & set(train.classes):
        raise DataError(
            f"{folder} has no folder named after a class of the training part, as "
            f"{train.classes[0]}; sort its images into folders named after their classes"
        )
    names = test.classes or ()
    unknown = [name for name in names if name not in train.classes]
    if unknown:
        raise DataError(
            f"{folder} has classes that the training part lacks: {', '.join(unknown[:5])}"
        )
    numbers = np.array([train.classes.index(name) for name in names], dtype=np.int64)
    return Listing(test.paths, numbers[test.labels], train.classes)


def images_below(folder: Path) -> list[Path]:
    """All images in a folder and the folders in it, sorted by name at each level.

    Raises:
        DataError: if a folder cannot be listed.
    """
    images, folders = _entries(folder)
    return images + [path for sub in folders for path in images_below(sub)]


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe or the like, which one could wait for without end.

    A link that leads nowhere is none: whoever reads it says so.
    """
    return not entry.is_file() and Path(entry.path).exists()


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and folders directly in a folder, each sorted by name."""
    images, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name == _JUNK:
                    continue
                if entry.is_dir():
                    folders.append(Path(entry.path))
                elif entry.name.lower().endswith(EXTENSIONS) and not _is_special(entry):
                    images.append(Path(entry.path))
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    return images, folders

"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), through torchvision.

torchvision compares the files with known checksums before it reads them, so a pickle of a
stranger is never opened.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torchvision import datasets

from sqakd_deploy.data.options import cache_folder
from sqakd_deploy.data.preprocessing import Preprocessing, named_augmentation
from sqakd_deploy.data.splits import ImageData, ImageSplit
from sqakd_deploy.errors import DataError

# Both as in the SQAKD paper's runs.
_CIFAR10 = Preprocessing(
    channels=3,
    input_size=(32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)
_CIFAR100 = Preprocessing(
    channels=3,
    input_size=(32, 32),
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
)


def load_cifar10(root: Path | None = None) -> ImageData:
    """50,000 training and 10,000 test images ``(N, 3, 32, 32)`` of 10 classes.

    Args:
        root: the folder that holds or shall hold ``cifar-10-batches-py``; None is the cache.

    Raises:
        DataError: if the files are neither there nor can be downloaded.
    """
    return _load("cifar10", datasets.CIFAR10, _CIFAR10, root)


def load_cifar100(root: Path | None = None) -> ImageData:
    """50,000 training and 10,000 test images ``(N, 3, 32, 32)`` of 100 classes.

    Args:
        root: the folder that holds or shall hold ``cifar-100-python``; None is the cache.

    Raises:
        DataError: if the files are neither there nor can be downloaded.
    """
    return _load("cifar100", datasets.CIFAR100, _CIFAR100, root)


def _load(
    name: str, source: type[datasets.CIFAR10], preprocessing: Preprocessing, root: Path | None
) -> ImageData:
    folder = root or cache_folder()
    train, classes = _read(name, source, folder, train=True)
    test, _ = _read(name, source, folder, train=False)
    return ImageData(
        name=name,
        train=train,
        test=test,
        classes=classes,
        preprocessing=preprocessing,
        augmentation=named_augmentation("cifar", preprocessing.input_size),
    )


def _read(
    name: str, source: type[datasets.CIFAR10], folder: Path, *, train: bool
) -> tuple[ImageSplit, tuple[str, ...]]:
    try:
        read = source(root=str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:  # no network, no disk space, or a wrong checksum
        raise DataError(
            f"{name} is not in {folder} and cannot be downloaded ({error}). Where there is a "
            f"network, fetch {source.filename} and unpack it so that "
            f"{folder / source.base_folder} exists, or set SQAKD_CACHE to "
            f"the folder that holds {source.base_folder}"
        ) from error
    images = np.ascontiguousarray(read.data.transpose(0, 3, 1, 2))
    labels = np.asarray(read.targets, dtype=np.int64)
    return ImageSplit(images, labels), tuple(read.classes)

"""Data by name or path."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sqakd_deploy.data.arrays import adapted
from sqakd_deploy.data.folder import load_folder
from sqakd_deploy.data.options import Progress, ReadOptions
from sqakd_deploy.data.splits import ImageData
from sqakd_deploy.errors import DataError
from sqakd_deploy.registry import Registry, unknown_name

Loader: TypeAlias = Callable[[Path | None], ImageData]


@dataclass(frozen=True)
class Dataset:
    """A data set with a name.

    Attributes:
        summary: one line for ``sqakd-deploy list``.
        loader: takes the folder to read from, or None for the default, and returns the data at
            its own size; a function, or ``"module:function"`` to import it when first needed.
    """

    summary: str
    loader: Loader | str

    def load(self, root: Path | None = None) -> ImageData:
        """Read the data.

        Args:
            root: the folder to read from; None is the default.

        Raises:
            DataError: if it cannot be read.
        """
        loader = pkgutil.resolve_name(self.loader) if isinstance(self.loader, str) else self.loader
        data: ImageData = loader(root)
        return data


DATASETS: Registry[Dataset] = Registry("data set", DataError)
DATASETS.register(
    "digits",
    Dataset("1,797 handwritten digits, 8×8 (embedded)", "sqakd_deploy.data.digits:load_digits"),
)
DATASETS.register(
    "cifar10",
    Dataset("60,000 photographs of 10 classes, 32×32", "sqakd_deploy.data.cifar:load_cifar10"),
)
DATASETS.register(
    "cifar100",
    Dataset("60,000 photographs of 100 classes, 32×32", "sqakd_deploy.data.cifar:load_cifar100"),
)


def load_data(
    name_or_path: str | Path,
    *,
    root: Path | None = None,
    input_size: tuple[int, int] | None = None,
    channels: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    skip_bad_images: bool = False,
    progress: Progress | None = None,
    limit: int | None = None,
) -> ImageData:
    """Read a data set by name, or a folder of images.

    Args:
        name_or_path: a registered name, or a folder; write ``./digits`` for a folder that has
            the name of a data set.
        root: where a named data set is kept.
        input_size: height and width of the images (pixels); None keeps the data's own.
        channels: 1 for grayscale, 3 for RGB; None keeps the data's own.
        mean: one value a channel, on the scale 0 to 1; None takes the data set's.
        std: one value a channel, on the scale 0 to 1; None takes the data set's.
        skip_bad_images: leave out files that cannot be decoded and list them in
            :attr:`ImageData.skipped`, instead of stopping.
        progress: called with the images done and their total while a folder is read.
        limit: at most so many images of each part, evenly spread.

    Raises:
        DataError: if there is no such data, or it cannot be read.
        SpecError: if an option is out of range.
    """
    options = ReadOptions(input_size, channels, mean, std, skip_bad_images, progress, limit)
    if isinstance(name_or_path, str) and name_or_path in DATASETS:
        return adapted(DATASETS[name_or_path].load(root), options)
    path = Path(name_or_path).expanduser()
    if not path.exists() and _is_bare(name_or_path):
        message = unknown_name(DATASETS.kind, str(name_or_path), list(DATASETS))
        raise DataError(f"{message} Nor is there a folder of that name.")
    return load_folder(path, options)


def _is_bare(name_or_path: str | Path) -> bool:
    return isinstance(name_or_path, str) and Path(name_or_path).name == name_or_path

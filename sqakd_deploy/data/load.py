"""Data by name or path."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from sqakd_deploy.data.arrays import adapted
from sqakd_deploy.data.folder import load_folder
from sqakd_deploy.data.options import Keeping, Message, Progress, ReadOptions
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.data.splits import ImageData
from sqakd_deploy.data.tiny_imagenet import is_tiny_imagenet, read_tiny_imagenet
from sqakd_deploy.errors import DataError
from sqakd_deploy.registry import Registry, unknown_name

Loader: TypeAlias = Callable[..., ImageData]


@dataclass(frozen=True)
class Dataset:
    """A data set with a name.

    Attributes:
        summary: one line for ``sqakd-deploy list``.
        loader: takes the folder to read from, or None for the default, and returns the data at
            its own size; a function, or ``"module:function"`` to import it when first needed.
        files: the data are image files: the loader takes the reading options, too, and follows
            them.
    """

    summary: str
    loader: Loader | str
    files: bool = False

    def load(self, root: Path | None = None, options: ReadOptions | None = None) -> ImageData:
        """Read the data.

        Args:
            root: the folder to read from; None is the default.
            options: a person's wishes.

        Raises:
            DataError: if it cannot be read.
            SpecError: if an option is out of range.
        """
        loader = pkgutil.resolve_name(self.loader) if isinstance(self.loader, str) else self.loader
        options = options or ReadOptions()
        data: ImageData = loader(root, options) if self.files else loader(root)
        return data if self.files else adapted(data, options)


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
DATASETS.register(
    "tiny-imagenet",
    Dataset(
        "110,000 photographs of 200 classes, 64×64",
        "sqakd_deploy.data.tiny_imagenet:load_tiny_imagenet",
        files=True,
    ),
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
    preprocessing: Preprocessing | None = None,
    augmentation: Augmentation | str | None = None,
    keeping: Keeping | None = None,
    message: Message = lambda text: None,
) -> ImageData:
    """Read a data set by name, or a folder of images.

    Args:
        name_or_path: a registered name, or a folder; write ``./digits`` for a folder that has
            the name of a data set.
        root: where a named data set is kept.
        input_size: height and width of the images (pixels); None keeps the data's own.
        channels: 1 for grayscale, 3 for RGB; None keeps the data's own.
        mean: one value a channel or one for all, on the scale 0 to 1; None takes the data set's.
        std: one value a channel or one for all, on the scale 0 to 1; None takes the data set's.
        skip_bad_images: leave out files that cannot be decoded and list them in
            :attr:`ImageData.skipped`, instead of stopping.
        progress: called with the images done and their total while a folder is read.
        limit: at most so many images of each part, evenly spread.
        preprocessing: of a trained model, in place of the data's own; what is given above wins.
        augmentation: random changes in training, by value or name; None is the data's own.
        keeping: where decoded images of a folder are kept; None is a cache on disk.
        message: told where they are kept if that is somewhere else, and of damaged caches.

    Raises:
        DataError: if there is no such data, or it cannot be read.
        SpecError: if an option is out of range.
    """
    options = ReadOptions(
        input_size=input_size,
        channels=channels,
        mean=mean,
        std=std,
        skip_bad_images=skip_bad_images,
        progress=progress,
        limit=limit,
        preprocessing=preprocessing,
        augmentation=augmentation,
        keeping=keeping or Keeping(),
        message=message,
    )
    if isinstance(name_or_path, str) and name_or_path in DATASETS:
        return DATASETS[name_or_path].load(root, options)
    path = Path(name_or_path).expanduser()
    if not path.exists() and _is_bare(name_or_path):
        unknown = unknown_name(DATASETS.kind, str(name_or_path), list(DATASETS))
        raise DataError(f"{unknown} Nor is there a folder of that name.")
    return (
        read_tiny_imagenet(path, options) if is_tiny_imagenet(path) else load_folder(path, options)
    )


def _is_bare(name_or_path: str | Path) -> bool:
    return isinstance(name_or_path, str) and Path(name_or_path).name == name_or_path

"""What :func:`~sqakd_deploy.training.distillation.distill` is given as batches to go through."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sqakd_deploy.data.batches import mixed_seed
from sqakd_deploy.errors import DataError
from sqakd_deploy.nonfinite import check_images
from sqakd_deploy.spec import DistillConfig
from sqakd_deploy.training.fitting import Loader


class TensorBatches:
    """Shuffled batches of a tensor of preprocessed images ``(N, C, H, W)``.

    The order depends on the seed and the epoch alone. The last batch is dropped if it is smaller
    than half of the others, or of one image: BatchNorm needs a batch.

    Raises:
        DataError: if there are fewer than two images.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        if len(images) < 2:
            raise DataError(f"wanted at least 2 images to train on, got {len(images)}")
        self.images = images
        self.batch_size = min(batch_size, len(images))
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 1 and rest * 2 >= self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.images), generator=generator)
        for indices in itertools.islice(order.split(self.batch_size), len(self)):
            yield self.images[indices]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration uses."""
        self.epoch = epoch


def as_loader(images: Tensor | Loader, config: DistillConfig) -> Loader:
    """Batches to train on: those given, or a tensor's.

    Raises:
        DataError: if there are too few images, or batches without a length; if a tensor's are not
            all finite, before any work is done by them.
    """
    if isinstance(images, Tensor):
        check_images(images)
        return TensorBatches(images, config.batch_size, config.seed)
    try:
        count = len(images)
    except TypeError as error:
        raise DataError(
            "images: wanted a tensor, or batches whose number is known and that can be gone "
            f"through in every epoch, got a {type(images).__name__} ({error}); give a list of "
            "batches, or a DataLoader of a data set with a length"
        ) from error
    if not count:
        raise DataError("images: wanted batches to train on, got none")
    return images


def check_repeatable(calibration: Tensor | Iterable[object] | None) -> None:
    """Refuse images to calibrate by that are there only once: BatchNorm needs them again.

    Raises:
        DataError: if so.
    """
    if isinstance(calibration, Iterator):
        raise DataError(
            "calibration: wanted a tensor, or batches that can be gone through several times, got "
            f"a {type(calibration).__name__}; give a list of them"
        )

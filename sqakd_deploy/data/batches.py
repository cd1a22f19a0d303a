"""Arrays of images as torch batches, without labels, and with them where labels are meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqakd_deploy.data.change import Change, Drawn
from sqakd_deploy.data.gather import Gather
from sqakd_deploy.data.images import Images
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.errors import DataError, SpecError


class Batches:
    """Preprocessed float32 batches ``(B, C, H, W)`` of images, and nothing but images.

    Everything random in an epoch is drawn from the seed and the epoch's number alone, on the CPU
    and before its first batch: the same two give the same batches, bit for bit, whatever else
    the program draws and on whatever device. Iterating does not advance the epoch.

    BatchNorm cannot train on one image. A last batch that would hold a single one is joined to
    the batch before it, which then holds ``batch_size + 1``; with ``drop_last`` every short last
    batch is dropped, unless it is the only one.

    Args:
        images: uint8 ``(N, C, H, W)``: an array, a memory map, of which a batch at a time is read,
            or what its workers make a few batches ahead.
        preprocessing: applied to every batch.
        batch_size: images a batch.
        shuffle: a new order each epoch, for training; False keeps the order, for evaluation.
        seed: of the order and the augmentation.
        augmentation: random changes; None makes none.
        drop_last: drop a short last batch, so that all have one shape.
        device: where the batches are made.
        shard: (k, n) yields the k-th of n equal parts of each batch, for the k-th of n processes;
            what does not divide is left out.

    Raises:
        DataError: if the images have another shape than the preprocessing says, if there are
            none, or if there is a single one to train on.
        SpecError: if the batch size is below 1.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        preprocessing.check_stored(images)
        if len(images) < (2 if shuffle else 1):
            raise DataError(f"wanted at least {2 if shuffle else 1} images, got {len(images)}")
        self.images = images
        self.preprocessing = preprocessing
        self.augmentation = augmentation or Augmentation()
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.device = torch.device(device)
        whole = batch_bounds(len(images), batch_size, drop_last=drop_last)
        self._bounds = [_part(bounds, *shard) for bounds in whole]
        self._gather = Gather(images, pin=self.device.type == "cuda")
        self._change = Change(preprocessing, self.augmentation, self.device)

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[Tensor]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[Tensor]:
        """The epoch's batches from the one of that number (from 0); those before are not read."""
        return (images for _, images in self.indexed(step))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order and augmentation the next iteration uses."""
        self.epoch = epoch

    def indexed(self, step: int = 0) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Each batch from ``step`` with the indices ``(B,)`` of its images in the array."""
        plan = self._plan()
        bounds = self._bounds[step:]
        batches = [plan.order[start:stop] for start, stop in bounds]
        gathered = self._gather(batches)
        for (start, stop), indices, images in zip(bounds, batches, gathered, strict=True):
            yield indices, self._change(images, plan.drawn.at(slice(start, stop)))

    def _plan(self) -> _Plan:
        count = len(self.images)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        order = torch.randperm(count, generator=generator)
        size = (self.images.shape[2], self.images.shape[3])
        drawn = Drawn.draw(count, size, self.augmentation, generator)
        return _Plan(order.numpy() if self.shuffle else np.arange(count), drawn)


class LabelledBatches:
    """Batches with their labels, for training a teacher and for supervised baselines.

    Args:
        batches: the images.
        labels: class indices int64 ``(N,)`` of all its images.

    Raises:
        DataError: if there are not as many labels as images.
    """

    def __init__(self, batches: Batches, labels: NDArray[np.int64]) -> None:
        if len(labels) != len(batches.images):
            raise DataError(f"wanted {len(batches.images)} labels, got {len(labels)}")
        self.batches = batches
        self._labels = torch.from_numpy(np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches from the one of that number (from 0); those before are not read."""
        for indices, images in self.batches.indexed(step):
            yield images, self._labels[torch.from_numpy(indices)].to(images.device)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order and augmentation the next iteration uses."""
        self.batches.set_epoch(epoch)


@dataclass(frozen=True)
class _Plan:
    """Everything random in one epoch, by position in the epoch.

    Attributes:
        order: the image at each position, int64 ``(N,)``.
        drawn: what happens to each image.
    """

    order: NDArray[np.int64]
    drawn: Drawn


def batch_bounds(count: int, batch_size: int, *, drop_last: bool) -> list[tuple[int, int]]:
    """Start and end of each batch over ``count`` images; see :class:`Batches` for the last.

    Raises:
        SpecError: if the batch size is below 1.
    """
    if batch_size < 1:
        raise SpecError(f"batch size: wanted at least 1, got {batch_size}")
    starts, end = list(range(0, count, batch_size)), count
    tail = count - starts[-1]
    if len(starts) > 1 and tail < batch_size:
        if drop_last:
            end = starts.pop()
        elif tail == 1:
            starts.pop()  # so the batch before it goes on to the end
    return list(zip(starts, [*starts[1:], end], strict=True))


def _part(bounds: tuple[int, int], number: int, parts: int) -> tuple[int, int]:
    start, stop = bounds
    size = (stop - start) // parts
    if size == 0:
        raise SpecError(f"batch size: wanted at least {parts}, one image a process")
    return start + number * size, start + (number + 1) * size


def mixed_seed(seed: int, epoch: int) -> int:
    """One generator seed from both; neighbouring pairs give unrelated streams."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])

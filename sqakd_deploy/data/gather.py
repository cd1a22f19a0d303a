"""Batches of stored images, one after the other: from an array, or made ahead by workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sqakd_deploy.data.images import Images
from sqakd_deploy.data.on_demand import ImagesOnDemand
from sqakd_deploy.errors import DataError

Indices: TypeAlias = NDArray[np.int64]

_AHEAD = 2  # batches that each worker has ready


class Gather:
    """Takes images from where they are kept.

    Args:
        images: uint8 ``(N, C, H, W)``.
        pin: keep what workers make in page-locked memory, from which a GPU copies faster.
    """

    def __init__(self, images: Images, *, pin: bool = False) -> None:
        self.images = images
        self._order: list[Indices] = []
        self._busy = False
        self._loader: DataLoader[Tensor | str] | None = None
        if isinstance(images, ImagesOnDemand) and images.workers > 0:
            self._loader = _loader(images, self._order, pin=pin)

    def __call__(self, batches: Sequence[Indices]) -> Iterator[Tensor]:
        """uint8 ``(B, C, H, W)`` for each array of indices ``(B,)``, in that order.

        Raises:
            DataError: if a file cannot be decoded, naming it, or a worker dies.
        """
        if self._loader is None:
            # Indexing copies, so torch never holds on to a read-only memory map.
            return (torch.from_numpy(self.images[indices]) for indices in batches)
        return self._made(self._loader, batches)

    def _made(
        self, loader: DataLoader[Tensor | str], batches: Sequence[Indices]
    ) -> Iterator[Tensor]:
        if self._busy:  # a second iteration beside the first needs workers of its own
            yield from Gather(self.images, pin=loader.pin_memory)(batches)
            return
        self._busy = True
        self._order[:] = batches
        try:
            for images in loader:
                if isinstance(images, str):
                    raise DataError(images)
                yield images
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that reads images ended ({error}); if memory or /dev/shm ran out, "
                "take fewer with --workers, or none with --workers 0"
            ) from error
        finally:
            self._busy = False


class _Making(Dataset["Tensor | str"]):
    """A batch of images as an item, so that one worker makes the whole of it."""

    def __init__(self, images: ImagesOnDemand) -> None:
        self.images = images

    def __getitem__(self, indices: Indices) -> Tensor | str:
        try:
            return torch.from_numpy(self.images[indices])
        except DataError as error:  # raised here, it would arrive with the worker's traceback
            return str(error)


def _leave_interrupts_alone(worker: int) -> None:
    """A terminal sends Ctrl-C to workers, too; the step under way still needs their images."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader(images: ImagesOnDemand, order: list[Indices], *, pin: bool) -> DataLoader[Tensor | str]:
    """Workers that stay from epoch to epoch; ``order`` is read anew in each."""
    return DataLoader(
        _Making(images),
        batch_size=None,
        sampler=order,
        num_workers=images.workers,
        prefetch_factor=_AHEAD,
        persistent_workers=True,
        pin_memory=pin,
        worker_init_fn=_leave_interrupts_alone,
        generator=torch.Generator(),  # else it draws a seed from everybody's generator
    )

"""What looks like an array of images and is made when it is indexed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ImagesOnDemand(ABC):
    """uint8 ``(N, C, H, W)`` on paper.

    Attributes:
        channels: 1 for grayscale, 3 for RGB.
        size: height and width (pixels).
        workers: processes that make images in training; 0 makes them where they are asked for.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4
    channels: int
    size: tuple[int, int]
    workers: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select(self, which: Any) -> Any:
        """The images at a slice, at indices or under a mask, not made."""

    @abstractmethod
    def made(self, indices: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The images at indices ``(M,)``, as an array ``(M, C, H, W)``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self), self.channels, *self.size)

    @property
    def nbytes(self) -> int:
        """Size once made (bytes)."""
        return prod(self.shape)

    def __getitem__(self, key: Any) -> Any:
        """Make the images at indices ``(M,)`` or at one; a slice gives images, not made.

        Raises:
            DataError: if one cannot be read, naming it.
        """
        if isinstance(key, slice):
            return self.select(key)
        indices = np.asarray(key)
        return self.made(indices.ravel()).reshape(*indices.shape, *self.shape[1:])

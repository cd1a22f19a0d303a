"""Arrays of images that look like larger ones, or like some of their images."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.decode import fit_images
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.images import Images


class FittedImages:
    """uint8 ``(N, C, H, W)`` on paper; a batch is taken and fitted when it is indexed.

    CIFAR-10 at the 256×256 of ImageNet's models would take 11 GiB, 64 times what is behind it.

    Args:
        source: uint8 ``(M, C₀, H₀, W₀)`` of 1 or 3 channels.
        channels: 1 for grayscale, 3 for RGB.
        size: height and width (pixels), as for :func:`~sqakd_deploy.data.decode.fit_image`.
        which: indices of the images ``(N,)``; None takes all.
        workers: processes that fit in training; 0 fits where it is asked.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        source: Images,
        channels: int,
        size: tuple[int, int],
        *,
        which: NDArray[np.intp] | None = None,
        workers: int = 0,
    ) -> None:
        self.source, self.channels, self.size, self.workers = source, channels, size, workers
        self.which = np.arange(len(source), dtype=np.intp) if which is None else which

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self.which), self.channels, *self.size)

    @property
    def nbytes(self) -> int:
        """Size once fitted (bytes)."""
        return prod(self.shape)

    def __len__(self) -> int:
        return len(self.which)

    def select(self, which: Any) -> FittedImages:
        """The images at a slice or at indices, not fitted."""
        kept = self.which[which]
        return FittedImages(self.source, self.channels, self.size, which=kept, workers=self.workers)

    def __getitem__(self, key: Any) -> Any:
        """Fit the images at indices ``(M,)`` or at one; a slice gives images, not fitted."""
        if isinstance(key, slice):
            return self.select(key)
        indices = np.asarray(key)
        taken = self.source[self.which[indices.ravel()]]
        fitted: Any = fit_images(taken, self.channels, self.size)
        return fitted.reshape(*indices.shape, *self.shape[1:])


def chosen(images: Images, which: NDArray[np.intp]) -> Images:
    """The images at some indices ``(M,)``, read when they are asked for."""
    if isinstance(images, ImageFiles | FittedImages):
        return images.select(which)
    return FittedImages(images, images.shape[1], images.shape[2:4], which=which)  # type: ignore[arg-type]

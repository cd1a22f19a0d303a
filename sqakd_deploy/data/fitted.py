"""Arrays of images that look like larger ones, or like some of their images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.decode import fit_images
from sqakd_deploy.data.images import Images
from sqakd_deploy.data.on_demand import ImagesOnDemand
from sqakd_deploy.data.splits import ImageSplit, spread


class FittedImages(ImagesOnDemand):
    """uint8 ``(N, C, H, W)`` on paper; a batch is taken and fitted when it is indexed.

    CIFAR-10 at the 256×256 of ImageNet's models would take 11 GiB, 64 times what is behind it.

    Args:
        source: uint8 ``(M, C₀, H₀, W₀)`` of 1 or 3 channels.
        channels: 1 for grayscale, 3 for RGB.
        size: height and width (pixels), as for :func:`~sqakd_deploy.data.decode.fit_image`.
        which: indices of the images ``(N,)``; None takes all.
        workers: processes that fit in training; 0 fits where it is asked.
    """

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

    def __len__(self) -> int:
        return len(self.which)

    def select(self, which: Any) -> FittedImages:
        """The images at a slice or at indices, not fitted."""
        kept = self.which[which]
        return FittedImages(self.source, self.channels, self.size, which=kept, workers=self.workers)

    def made(self, indices: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The images at indices ``(M,)``, fitted."""
        return np.asarray(fit_images(self.source[self.which[indices]], self.channels, self.size))


def chosen(images: Images, which: NDArray[np.intp]) -> Images:
    """The images at some indices ``(M,)``, read when they are asked for."""
    if isinstance(images, ImagesOnDemand):
        return images.select(which)
    return FittedImages(images, images.shape[1], images.shape[2:4], which=which)  # type: ignore[arg-type]


def limited(part: ImageSplit, limit: int | None) -> ImageSplit:
    """At most so many images of a part, evenly spread, read when they are asked for."""
    which = spread(len(part), limit)
    labels = None if part.labels is None else part.labels[which]
    return ImageSplit(chosen(part.images, which), labels)

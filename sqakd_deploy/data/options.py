"""How images are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sqakd_deploy.errors import SpecError

Progress: TypeAlias = Callable[[int, int], None]  # (images done, images in total)


@dataclass(frozen=True)
class ReadOptions:
    """What a person may say about reading; None leaves the data set's own choice.

    Attributes:
        input_size: height and width of the images (pixels).
        channels: 1 for grayscale, 3 for RGB.
        mean: one value a channel, on the scale 0 to 1.
        std: one value a channel, on the scale 0 to 1.
        skip_bad_images: leave out files that cannot be decoded, instead of stopping.
        progress: called with the images done and their total, from the calling thread.
        limit: read at most so many images of each part, evenly spread; for trials.
    """

    input_size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    skip_bad_images: bool = False
    progress: Progress | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise SpecError(f"channels: wanted 1 (grayscale) or 3 (RGB), got {self.channels}")
        if self.limit is not None and self.limit < 1:
            raise SpecError(f"limit: wanted at least 1 image, got {self.limit}")

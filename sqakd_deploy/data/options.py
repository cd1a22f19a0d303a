"""How images are read and kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.errors import SpecError

Progress: TypeAlias = Callable[[int, int], None]  # (images done, images in total)
Message: TypeAlias = Callable[[str], None]

_MOST_WORKERS = 8  # beyond which reading, not decoding, is what a machine waits for


def default_workers() -> int:
    """A process for each core but the one that trains, at least 1 and at most 8.

    Cores are those that this process may use: in a container or pinned, fewer than there are.
    """
    known = hasattr(os, "sched_getaffinity")  # not on every system
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(_MOST_WORKERS, max(1, cores - 1))


def cache_folder() -> Path:
    """Where downloads and decoded images go.

    ``$SQAKD_CACHE``, or ``sqakd-deploy`` in the user's cache folder: ``$XDG_CACHE_HOME`` or
    ``~/.cache``, and ``%LOCALAPPDATA%`` on Windows.
    """
    own = os.environ.get("SQAKD_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or (os.name == "nt" and os.environ.get("LOCALAPPDATA"))
    return (Path(base) if base else Path.home() / ".cache") / "sqakd-deploy"


@dataclass(frozen=True)
class Keeping:
    """Where decoded images are kept.

    Attributes:
        cache: the folder of memory-mapped caches, False for none, None for the default.
        max_cache_gb: larger folders (decoded, in GiB) are decoded by workers in every epoch.
        workers: that many processes; 0 decodes in the training process, None suits the machine.
            They also resize what is in memory where that would be too large.
    """

    cache: Path | Literal[False] | None = None
    max_cache_gb: float = 16.0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.max_cache_gb < 0:
            raise SpecError(f"max_cache_gb: wanted at least 0, got {self.max_cache_gb}")
        if self.workers is not None and self.workers < 0:
            raise SpecError(f"workers: wanted at least 0, got {self.workers}")

    @property
    def folder(self) -> Path | None:
        """The cache folder, or None where nothing shall be cached."""
        if self.cache is False:
            return None
        return cache_folder() if self.cache is None else self.cache.expanduser()

    @property
    def worker_count(self) -> int:
        """Number of worker processes."""
        return default_workers() if self.workers is None else self.workers


@dataclass(frozen=True)
class ReadOptions:
    """What a person may say about reading; None leaves the data set's own choice.

    Attributes:
        input_size: height and width of the images (pixels).
        channels: 1 for grayscale, 3 for RGB.
        mean: one value a channel or one for all, on the scale 0 to 1.
        std: one value a channel or one for all, on the scale 0 to 1.
        skip_bad_images: leave out files that cannot be decoded, instead of stopping.
        progress: called with the images done and their total, from the calling thread.
        limit: read at most so many images of each part, evenly spread; for trials.
        preprocessing: what a trained model wants, in place of the data set's own; the values
            above win over it.
        augmentation: random changes in training.
        keeping: where decoded images are kept.
        message: told what was decided about that.
    """

    input_size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    skip_bad_images: bool = False
    progress: Progress | None = None
    limit: int | None = None
    preprocessing: Preprocessing | None = None
    augmentation: Augmentation | str | None = None
    keeping: Keeping = field(default_factory=Keeping)
    message: Message = lambda text: None

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise SpecError(f"channels: wanted 1 (grayscale) or 3 (RGB), got {self.channels}")
        if self.limit is not None and self.limit < 1:
            raise SpecError(f"limit: wanted at least 1 image, got {self.limit}")

    def changed(self, own: Preprocessing) -> Preprocessing:
        """The data set's own preprocessing, or the model's, with a person's wishes put over it.

        Raises:
            SpecError: if a wish is out of range.
        """
        return (self.preprocessing or own).changed(
            channels=self.channels, input_size=self.input_size, mean=self.mean, std=self.std
        )

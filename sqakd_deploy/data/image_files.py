"""Image files that look like an array, and are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.decode import decode_file
from sqakd_deploy.data.on_demand import ImagesOnDemand


class ImageFiles(ImagesOnDemand):
    """uint8 ``(N, C, H, W)`` on paper; a batch is decoded when it is indexed.

    Names are kept as one array of bytes: a million Python strings would cost each forked worker
    a copy of their pages, since even reading them counts references.

    Args:
        root: folder that all files are in.
        paths: N files below it.
        channels: 1 for grayscale, 3 for RGB.
        size: height and width (pixels), as for :func:`~sqakd_deploy.data.decode.decode_file`.
        workers: processes that decode in training; 0 decodes where it is asked.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[Path],
        channels: int,
        size: tuple[int, int],
        workers: int = 0,
    ) -> None:
        self.root, self.channels, self.size, self.workers = root, channels, size, workers
        start = len(str(root / "_")) - 1  # slicing is 25 times faster than Path.relative_to
        relative = [os.fsencode(str(path)[start:]) for path in paths]
        self.names: NDArray[np.bytes_] = np.array(relative, dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file at an index."""
        return self.root / os.fsdecode(bytes(self.names[index]))

    def locations(self) -> Iterator[bytes]:
        """The files' paths as bytes, which cost less than path objects."""
        root = os.fsencode(self.root / "_")[:-1]
        return (root + bytes(name) for name in self.names)

    @property
    def paths(self) -> list[Path]:
        """All files, in order."""
        return [self.path(index) for index in range(len(self))]

    def select(self, which: Any) -> ImageFiles:
        """The files at a slice, at indices or under a mask, not decoded."""
        chosen = object.__new__(ImageFiles)
        chosen.__dict__.update(self.__dict__, names=self.names[which])
        return chosen

    def with_workers(self, workers: int) -> ImageFiles:
        """The same files, decoded by so many processes in training."""
        same = self.select(slice(None))
        same.workers = workers
        return same

    def made(self, indices: NDArray[np.intp]) -> NDArray[np.uint8]:
        """The files at indices ``(M,)``, decoded.

        Raises:
            DataError: if one cannot be decoded, naming it.
        """
        out = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for pixels, index in zip(out, indices, strict=True):
            pixels[...] = decode_file(self.path(int(index)), self.channels, self.size)
        return out

"""Image files that look like an array, and are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.decode import decode_file


class ImageFiles:
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

    dtype = np.dtype(np.uint8)
    ndim = 4

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

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self), self.channels, *self.size)

    @property
    def nbytes(self) -> int:
        """Size once decoded (bytes)."""
        return prod(self.shape)

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

    def __getitem__(self, key: Any) -> Any:
        """Decode the images at indices ``(M,)`` or at one; a slice gives files, not decoded.

        Raises:
            DataError: if a file cannot be decoded, naming it.
        """
        if isinstance(key, slice):
            return self.select(key)
        indices = np.asarray(key)
        out = np.empty((indices.size, *self.shape[1:]), np.uint8)
        for pixels, index in zip(out, indices.ravel(), strict=True):
            pixels[...] = decode_file(self.path(int(index)), self.channels, self.size)
        return out.reshape(*indices.shape, *self.shape[1:])

"""Decoded images on disk, memory-mapped.

A cache is two files: ``<slot>-<key>.u8``, the bytes of uint8 ``(M, C, H, W)``, and
``<slot>-<key>.json``, which describes and vouches for them. The slot names the folder, channels
and size; the key hashes every file's name, length and time of change, so that a changed folder
finds no cache and replaces its old one.

Both are written under temporary names and then renamed, the description last. Two runs that build
the same cache write the same bytes; whichever renames last wins, and what the other has mapped
stays readable. Images are written in order, not through the map: a full disk is then an error
that can be handled, where a store to a page without a block would kill the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from numpy.typing import NDArray

from sqakd_deploy.data.decode import Decoded, decode_chunks, sorted_out
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.options import Message, Progress
from sqakd_deploy.errors import DataError

_FORMAT = 2  # to be raised whenever decoding or these files change
_BLOCK = 1 << 20  # bytes summed at a time
_MOST_BLOCKS = 1024  # a GiB is summed in 0.15 s; of more, evenly spread blocks are
_ABANDONED = 3600  # seconds without a write after which a temporary file's builder is dead
_TEMPORARY = ".tmp"
_SUFFIXES = (".u8", ".json", ".bad")


class DamagedError(Exception):
    """A cache is there, but not as it was written."""


@dataclass(frozen=True)
class Cache:
    """Where the decoded form of some files is, or will be.

    Attributes:
        folder: of all caches.
        slot: which files they are, however often they change.
        key: what they hold now.
    """

    folder: Path
    slot: str
    key: str

    @classmethod
    def of(cls, files: ImageFiles, folder: Path, part: str = "") -> Cache:
        """The cache of some files.

        Args:
            files: to look at; none is opened.
            folder: of all caches.
            part: tells caches of one folder and size apart that shall live beside each other.
        """
        root = os.fsencode(files.root.resolve())
        slot = _hash(root, repr(files.shape[1:]).encode(), part.encode())
        version = f"{_FORMAT} {PIL.__version__}".encode()
        return cls(folder, slot, _hash(version, b"\n".join(files.names.tolist()), _state(files)))

    @property
    def data(self) -> Path:
        """The images."""
        return self.folder / f"{self.slot}-{self.key}.u8"

    @property
    def facts(self) -> Path:
        """Their description."""
        return self.folder / f"{self.slot}-{self.key}.json"

    @property
    def note(self) -> Path:
        """A list of files that cannot be decoded, where there are too many to keep images of."""
        return self.folder / f"{self.slot}-{self.key}.bad"

    def open(self, files: ImageFiles) -> Decoded | None:
        """The images, or None where there is no cache of these files as they are now.

        Raises:
            DamagedError: if there is one that is not as it was written.
        """
        if not (self.facts.exists() and self.data.exists()):
            return None
        try:
            facts = json.loads(self.facts.read_bytes())
            bad = np.array(facts["bad"], dtype=np.intp)
            crc = facts["crc32"]
            good = np.ones(len(files), np.bool_)
            good[bad] = False
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedError(f"its description cannot be read ({error})") from error
        images = self._mapped((int(good.sum()), *files.shape[1:]))
        if _checksum(images.reshape(-1), facts["bad"]) != crc:
            raise DamagedError("its checksum is wrong")
        return Decoded(images, good, tuple(files.path(index) for index in bad))

    def _mapped(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        try:
            size = self.data.stat().st_size
            if size != prod(shape):
                raise DamagedError(f"wanted {prod(shape)} bytes, found {size}")
            # A plain view: each index into a memmap object costs some Python. It keeps the map.
            return np.memmap(self.data, np.uint8, "r", shape=shape).view(np.ndarray)
        except (OSError, ValueError) as error:  # numpy refuses to map an empty file
            raise DamagedError(f"it cannot be mapped ({error})") from error

    def build(
        self, files: ImageFiles, *, skip_bad: bool = False, progress: Progress | None = None
    ) -> Decoded:
        """Decode the files into the cache, in place of what their slot held before.

        Args:
            files: to decode.
            skip_bad: as for :func:`~sqakd_deploy.data.decode.decode_files`.
            progress: as for :func:`~sqakd_deploy.data.decode.decode_files`.

        Raises:
            DataError: if a file cannot be decoded, or none can.
            OSError: if the cache cannot be written; nothing of it is left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{self.slot}-{self.key}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            with temporary.open("wb") as file:
                flags = _write(file, files, skip_bad=skip_bad, progress=progress)
                _settle(file)
            bad = np.flatnonzero(~sorted_out(files.paths, flags)[0]).tolist()
            if len(bad) == len(files):
                raise DataError(f"none of the {len(files)} images in {files.root} can be read")
            crc = _checksum(np.memmap(temporary, np.uint8, "r"), bad)
            temporary.replace(self.data)
            self._describe(temporary, {"crc32": crc, "bad": bad, "root": str(files.root)})
        finally:
            temporary.unlink(missing_ok=True)
        self._clear()
        try:
            built = self.open(files)
        except DamagedError as error:
            raise OSError(
                f"what was written to {self.data} reads back otherwise: {error}"
            ) from error
        if built is None:  # another run found the folder changed, and replaced this cache at once
            raise OSError(f"{self.data} was removed by another run")
        return built

    def _describe(self, temporary: Path, facts: dict[str, Any]) -> None:
        with temporary.open("wb") as file:
            file.write(json.dumps(facts).encode())
            _settle(file)
        temporary.replace(self.facts)

    def _clear(self) -> None:
        """Remove the slot's older caches, and what killed builders left of any."""
        kept = (self.data, self.facts)
        for path in self.folder.iterdir():
            with suppress(OSError):  # gone, or on Windows in use: then a later build removes it
                own = path.name.startswith(f"{self.slot}-") and path.suffix in _SUFFIXES
                left = path.suffix == _TEMPORARY and _idle(path) > _ABANDONED
                if left or (own and path not in kept):
                    path.unlink()


def cached(
    cache: Cache,
    files: ImageFiles,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
    message: Message = lambda text: None,
) -> Decoded:
    """The files' images from their cache, which is built if it is absent, stale or damaged.

    Raises:
        DataError: if a file cannot be decoded, naming it.
        OSError: if the cache has to be built and cannot be written.
    """
    try:
        found = cache.open(files)
    except DamagedError as error:
        message(f"the cache {cache.data} is damaged: {error}; decoding the images again")
        found = None
    if found is None or (found.bad and not skip_bad):  # which says what is wrong with a bad file
        return cache.build(files, skip_bad=skip_bad, progress=progress)
    return found


def _write(
    file: BinaryIO, files: ImageFiles, *, skip_bad: bool, progress: Progress | None
) -> list[NDArray[np.bool_]]:
    flags = []
    chunks = decode_chunks(
        files.paths, files.channels, files.size, skip_bad=skip_bad, progress=progress
    )
    for images, good in chunks:
        file.write(np.ascontiguousarray(images).data)
        flags.append(good)
    return flags


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _checksum(data: NDArray[np.uint8], bad: Sequence[int]) -> int:
    """CRC-32 of the list of bad files and of evenly spread blocks, the first and last included."""
    total = zlib.crc32(json.dumps(bad).encode())
    count = -(-len(data) // _BLOCK)
    for block in np.unique(np.linspace(0, max(0, count - 1), min(count, _MOST_BLOCKS)).astype(int)):
        total = zlib.crc32(data[block * _BLOCK : (block + 1) * _BLOCK].data, total)
    return total


def _state(files: ImageFiles) -> bytes:
    """Length and time of change of each file."""
    return np.array([_length_and_time(path) for path in files.locations()], np.int64).tobytes()


def _length_and_time(path: bytes) -> tuple[int, int]:
    """Of a file that is not there (a link to nothing), values that no file has.

    Decoding finds it bad, and says so or skips it.
    """
    try:
        state = os.stat(path)  # noqa: PTH116 - bytes
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _idle(path: Path) -> float:
    return time.time() - path.stat().st_mtime

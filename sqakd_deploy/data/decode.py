"""From image files to uint8 arrays, in threads."""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sqakd_deploy.data.images import Images
from sqakd_deploy.data.options import Progress
from sqakd_deploy.errors import DataError

# What Pillow's readers raise on files that are damaged or no images at all.
UNREADABLE = (
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 64  # files that a thread takes at a time
_SMALL_FILE = 16 * 1024  # bytes


@dataclass(frozen=True, eq=False)
class Decoded:
    """The files that could be read, and those that could not.

    Attributes:
        images: uint8 ``(M, C, H, W)``, in the order of the files.
        good: which files they are, ``(N,)``.
        bad: the other files, in order.
    """

    images: Images
    good: NDArray[np.bool_]
    bad: tuple[Path, ...]


def decode_files(
    paths: Sequence[Path],
    channels: int,
    size: tuple[int, int],
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Decoded:
    """Decode every file once into memory, in as many threads as suit the machine.

    Args:
        paths: N image files.
        channels: 1 for grayscale, 3 for RGB.
        size: height and width of the result (pixels); see :func:`fit_image`.
        skip_bad: note files that cannot be decoded instead of stopping at the first.
        progress: called in this thread after every few images, and after the last.

    Raises:
        DataError: if a file cannot be decoded, naming it.
    """
    images = np.empty((len(paths), channels, *size), dtype=np.uint8)
    flags, count = [], 0
    chunks = decode_chunks(paths, channels, size, skip_bad=skip_bad, progress=progress)
    for pixels, good in chunks:
        images[count : count + len(pixels)] = pixels
        count += len(pixels)
        flags.append(good)
    return Decoded(images[:count], *sorted_out(paths, flags))


def sorted_out(
    paths: Sequence[Path], flags: Sequence[NDArray[np.bool_]]
) -> tuple[NDArray[np.bool_], tuple[Path, ...]]:
    """Which of all files were read ``(N,)``, from the flags of each chunk, and the others."""
    good = np.concatenate([np.ones(0, np.bool_), *flags])
    return good, tuple(paths[int(index)] for index in np.flatnonzero(~good))


def decode_chunks(
    paths: Sequence[Path],
    channels: int,
    size: tuple[int, int],
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """:func:`decode_files`, a few at a time and in order, for more images than memory holds.

    Yields:
        The images that could be read, uint8 ``(M, C, H, W)``, and which files of the next few
        they are, ``(K,)`` with K ≥ M.

    Raises:
        DataError: if a file cannot be decoded, naming it.
    """

    def decode(chunk: Sequence[Path]) -> tuple[NDArray[np.uint8], list[DataError | None]]:
        images = np.empty((len(chunk), channels, *size), dtype=np.uint8)
        errors = [_try_decode(path, out) for path, out in zip(chunk, images, strict=True)]
        return images, errors

    threads, done = _threads(paths), 0
    pool = ThreadPoolExecutor(threads)
    try:
        for images, errors in _ahead(pool, decode, _chunks(paths), 4 * threads):
            good = _judged(errors, skip_bad=skip_bad)
            yield (images if good.all() else images[good]), good
            done += len(good)
            if progress is not None:
                progress(done, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C must not wait for the rest


def _chunks(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    return (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterator[T], most: int
) -> Iterator[R]:
    """``pool.map`` with at most so many results waiting, which bounds the memory they take."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _try_decode(path: Path, out: NDArray[np.uint8]) -> DataError | None:
    """Fill ``out`` ``(C, H, W)``, or return what is wrong with the file."""
    try:
        out[...] = decode_file(path, out.shape[0], (out.shape[1], out.shape[2]))
    except DataError as error:
        return error
    return None


def _judged(errors: list[DataError | None], *, skip_bad: bool) -> NDArray[np.bool_]:
    for error in errors:
        if error is not None and not skip_bad:
            raise error
    return np.array([error is None for error in errors], dtype=np.bool_)


def _threads(paths: Sequence[Path]) -> int:
    """Threads that pay: reading small files is mostly Python, where more threads only contend.

    10,000 CIFAR images as JPEG took 0.8 s in one thread and 1.0 s in two, on 2 cores.
    """
    sample = paths[:: max(1, len(paths) // 16)]
    sizes = [path.stat().st_size for path in sample if path.exists()]
    small = not sizes or sum(sizes) / len(sizes) < _SMALL_FILE
    return 1 if small else (os.cpu_count() or 1)


def decode_file(path: Path, channels: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """One image ``(C, H, W)``.

    Raises:
        DataError: if the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            # A large JPEG is decoded at a fraction of its size, never below twice what is wanted.
            # Not as "L": a file's own luma differs from that of its RGB, which others compute.
            image.draft("RGB", (2 * max(size), 2 * max(size)))
            return fit_image(ImageOps.exif_transpose(image), channels, size)
    except UNREADABLE as error:
        raise DataError(
            f"cannot read image {path}: {error}; remove it, or skip such files with "
            "--skip-bad-images"
        ) from error


def fit_image(image: Image.Image, channels: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Crop to the aspect of ``size`` about the centre, and resize (bilinear).

    Args:
        image: of any mode; 16 bits a pixel are reduced to 8, transparency is dropped.
        channels: 1 for grayscale, 3 for RGB.
        size: height and width (pixels).

    Returns:
        uint8 ``(C, H, W)``.
    """
    height, width = size
    converted = _eight_bit(image).convert("L" if channels == 1 else "RGB")
    if converted.size != (width, height):
        converted = ImageOps.fit(converted, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(converted)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def fit_images(images: Images, channels: int, size: tuple[int, int]) -> Images:
    """:func:`fit_image` on an array ``(N, C, H, W)`` of 1 or 3 channels."""
    if images.shape[1:] == (channels, *size):
        return images
    fitted = np.empty((len(images), channels, *size), dtype=np.uint8)
    for index in range(len(images)):
        image = images[index]
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        fitted[index] = fit_image(Image.fromarray(pixels), channels, size)
    return fitted


def _eight_bit(image: Image.Image) -> Image.Image:
    """Pillow saturates 16-bit pixels on conversion, and warns on palettes with transparency."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers without a known range")
    return image.convert("RGBA") if image.mode == "P" else image

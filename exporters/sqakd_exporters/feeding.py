"""How sessions give any number of prepared images to a file that may want something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import ExportError
from sqakd_deploy.pixels import to_pixels


def feed(
    run: Callable[[NDArray[Any]], NDArray[np.float32]],
    images: NDArray[np.float32] | NDArray[np.uint8],
    *,
    shape: Sequence[int | str | None],
    pixels: Mapping[str, str] | None,
    path: Path,
) -> NDArray[np.float32]:
    """Run images in the form and the batches that a file wants.

    A file for raw pixels is given those that the images were made of, or uint8 as it is. One of a
    fixed batch runs as often as it takes; what is missing in the last is filled up with zeros.

    Args:
        run: gives logits of one batch as the file takes it.
        images: preprocessed, ``(N, C, H, W)``.
        shape: of the file's input; what is no number is dynamic.
        pixels: the file's metadata if it takes raw pixels, else None.
        path: of the file, for errors.

    Raises:
        ExportError: if the images have another shape than the file's input, or are no prepared
            pixels where it wants pixels.
    """
    given = images if pixels is None else to_pixels(images, pixels)
    fits = len(shape) == given.ndim and all(
        not isinstance(extent, int) or extent == got
        for extent, got in zip(shape[1:], given.shape[1:], strict=True)
    )
    if not fits:
        shown = [extent if isinstance(extent, int) else "N" for extent in shape]
        raise ExportError(f"{path}: wanted images {shown}, got {list(given.shape)}")
    batch = np.ascontiguousarray(given, np.float32 if pixels is None else np.uint8)
    size = shape[0]
    if not isinstance(size, int) or len(batch) == size:
        return run(batch)
    missing = -len(batch) % size if len(batch) else size
    filled = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
    parts = [run(filled[start : start + size]) for start in range(0, len(filled), size)]
    return np.concatenate(parts)[: len(batch)]

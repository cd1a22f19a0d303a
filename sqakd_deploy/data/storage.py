"""Where a folder's decoded images are kept: on disk, in memory, or nowhere."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import numpy as np

from sqakd_deploy.data.cache import Cache, cached
from sqakd_deploy.data.decode import Decoded, decode_chunks, decode_files, sorted_out
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.options import ReadOptions
from sqakd_deploy.errors import DataError
from sqakd_deploy.files import write_text

_GIB = 1 << 30
_MEMORY = 2 * _GIB  # without a cache, more than this is not decoded into memory
_SPARE = 1 * _GIB  # of the disk, left to others


def read_images(files: ImageFiles, options: ReadOptions, part: str = "") -> Decoded:
    """The images of some files, each decoded once where there is room for them.

    They come from a memory-mapped cache; without one from memory, up to 2 GiB; and beyond that,
    or above the cache's limit or what the disk has free, from the files themselves, decoded by
    worker processes in every epoch. All three give the same images.

    Args:
        files: to read.
        options: where to keep them, and what to do about files that cannot be decoded.
        part: as for :meth:`Cache.of`.

    Raises:
        DataError: if a file cannot be decoded, or none can.
    """
    if files.nbytes > options.keeping.max_cache_gb * _GIB:
        limit = f"more than max_cache_gb = {options.keeping.max_cache_gb:g}"
        return _undecoded(files, options, limit)
    folder = options.keeping.folder
    if folder is None:
        return _uncached(files, options, "caching is off")
    cache = Cache.of(files, folder, f"{part} {options.limit}")
    try:
        _check_room(cache, files.nbytes)
        return cached(
            cache,
            files,
            skip_bad=options.skip_bad_images,
            progress=options.progress,
            message=options.message,
        )
    except OSError as error:
        return _uncached(files, options, f"the cache folder {folder} cannot be used ({error})")


def _check_room(cache: Cache, size: int) -> None:
    if cache.facts.exists():
        return
    above = next(path for path in (cache.folder, *cache.folder.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if size > free - min(_SPARE, size):
        raise OSError(f"{_gib(size)} are wanted, {_gib(free)} are free")


def _uncached(files: ImageFiles, options: ReadOptions, why: str) -> Decoded:
    if files.nbytes > _MEMORY:
        return _undecoded(files, options, f"too much for memory, and {why}")
    if options.keeping.folder is not None:
        options.message(f"{why}; the images are kept in memory")
    decoded = decode_files(
        files.paths,
        files.channels,
        files.size,
        skip_bad=options.skip_bad_images,
        progress=options.progress,
    )
    return _not_empty(decoded, files)


def _undecoded(files: ImageFiles, options: ReadOptions, why: str) -> Decoded:
    workers = options.keeping.worker_count
    options.message(
        f"{_gib(files.nbytes)} of decoded images are {why}: "
        f"{workers or 'no'} worker processes decode them in every epoch"
    )
    lazy = files.with_workers(workers)
    good = np.ones(len(files), np.bool_)
    if options.skip_bad_images:
        good[_bad(files, options)] = False
    bad = tuple(files.path(int(index)) for index in np.flatnonzero(~good))
    return _not_empty(Decoded(lazy.select(good) if bad else lazy, good, bad), files)


def _bad(files: ImageFiles, options: ReadOptions) -> list[int]:
    """Which files cannot be decoded: all are tried once, and the answer is kept in the cache."""
    folder = options.keeping.folder
    note = None if folder is None else Cache.of(files, folder, "bad").note
    if note is not None:
        with suppress(OSError, ValueError):
            known = json.loads(note.read_bytes())
            if isinstance(known, list) and all(0 <= index < len(files) for index in known):
                return known
    options.message("every image is decoded once to find those that cannot be")
    found = _search(files, options)
    if note is not None:
        with suppress(OSError):  # then the next run searches again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps(found))
    return found


def _search(files: ImageFiles, options: ReadOptions) -> list[int]:
    chunks = decode_chunks(
        files.paths, files.channels, files.size, skip_bad=True, progress=options.progress
    )
    good, _ = sorted_out(files.paths, [flags for _, flags in chunks])
    return [int(index) for index in np.flatnonzero(~good)]


def _not_empty(decoded: Decoded, files: ImageFiles) -> Decoded:
    if not decoded.good.any():
        raise DataError(f"none of the {len(files)} images in {files.root} can be read")
    return decoded


def _gib(size: int) -> str:
    return f"{size / _GIB:.3g} GiB"

"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqakd_deploy.errors import ExportError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without error.

    Yields:
        The path to write to; it is removed if the block fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_new_text(path: Path, text: str) -> None:
    """Write a text file whole, where there is none: of two who do so at once, one does.

    Raises:
        FileExistsError: if there is one.
    """
    written = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_text(written, text)
        try:
            path.hardlink_to(written)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            path.touch(exist_ok=False)
            written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def size_on_disk(path: Path) -> int:
    """Bytes of a file and of the weights that belong to it: IR's ``.bin``, and the files that an
    ONNX file names (external data), whatever lies beside it otherwise."""
    parts = {part.resolve() for part in (path, *_weights_of(path))}
    return sum(part.stat().st_size for part in parts if part.exists())


def _weights_of(path: Path) -> list[Path]:
    if path.suffix == ".xml":
        return [path.with_suffix(".bin")]
    from sqakd_deploy.onnx_file import read_onnx, weights_beside  # onnx takes a while

    try:
        return weights_beside(read_onnx(path, weights=False), path)
    except ExportError:  # another format, of a plugin's
        return []

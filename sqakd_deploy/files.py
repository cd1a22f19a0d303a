"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def size_on_disk(path: Path) -> int:
    """Bytes of a file and of the weights beside it (IR's ``.bin``, ONNX's external data)."""
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [Path(f"{path}.data")]
    return sum(part.stat().st_size for part in (path, *beside) if part.exists())

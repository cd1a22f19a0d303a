"""Compiled kernels that a killed run left half-written, and what is said where compiling fails.

torch's compiler takes a kernel's file that is there for a whole one. A run that is killed while the
linker writes leaves an empty or cut file, and every later run that needs this kernel would fail.
"""

from __future__ import annotations

import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqakd_deploy.errors import TrainingError

SETTLED = 30.0
"""Seconds after which nobody writes a kernel any more: linking one takes a second or two."""

_NAMED = re.compile(r"ImportError: (\S+\.so)\b")
_ELF, _HEADER = b"\x7fELF", 64  # magic; bytes of a 64-bit header


def remove_broken(folder: Path | None = None, *, settled: float = SETTLED) -> list[Path]:
    """Remove kernels that are not whole, so that they are compiled again.

    Args:
        folder: of kernels; None takes that of torch's compiler.
        settled: seconds since the last write, below which another process may be at it.

    Returns:
        Those removed.
    """
    now = time.time()
    broken = []
    for path in (folder or _cache()).glob("*/*.so"):
        try:
            if now - path.stat().st_mtime >= settled and not is_whole(path):
                path.unlink()
                broken.append(path)
        except OSError:  # somebody else's, or gone meanwhile
            continue
    return broken


def is_whole(path: Path) -> bool:
    """Whether a shared library is as long as its own header says.

    Linkers put the table of sections last; what is no 64-bit ELF file counts as whole unless it is
    empty.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or header[:4] != _ELF or header[4] != 2:  # 2: 64 bits
        return bool(header) and header[:4] != _ELF
    order = "<" if header[5] == 1 else ">"
    (start,) = struct.unpack_from(f"{order}Q", header, 40)
    size, count = struct.unpack_from(f"{order}HH", header, 58)
    return path.stat().st_size >= int(start) + int(size) * int(count)


@contextmanager
def compiling() -> Iterator[None]:
    """Context of steps that may compile: a failure is a clear error.

    Raises:
        TrainingError: if torch's compiler failed. A kernel that cannot be loaded is removed first.
    """
    try:
        yield
    except Exception as error:
        if not _of_the_compiler(error):
            raise
        raise TrainingError(_advice(error)) from error


def _advice(error: Exception) -> str:
    named = _NAMED.search(str(error))
    path = Path(named[1]) if named else None
    if path is not None and path.is_file() and not is_whole(path):
        path.unlink()
        return (
            f"the compiled kernel {path} was cut short, as by a run that was killed while it "
            "compiled; it is removed: start again (a run goes on with --resume)"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if not line.startswith("backend=")), type(error).__name__)
    return f"compiling failed: {said}. --compile off trains without; a run goes on with --resume"


def _of_the_compiler(error: Exception) -> bool:
    """Whether torch's compiler raised it, which is not imported for the question."""
    compiler = sys.modules.get("torch._dynamo.exc")
    return compiler is not None and isinstance(error, compiler.BackendCompilerFailed)


def _cache() -> Path:
    # Imported late: it takes a second, and only who compiles needs it.
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())

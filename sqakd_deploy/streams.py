"""Standard output and error, as shells and services set them up."""

from __future__ import annotations

import sys
from contextlib import suppress
from io import TextIOWrapper

_ANY = "–\udcff"  # a dash, and a byte of a file name that is no UTF-8


def take_any_text() -> None:
    """Let stdout and stderr write characters that their encoding lacks as escapes (``\\u2013``).

    Results are printed when hours of work are done: a locale of ASCII must not end them, nor a
    name of a file. Streams that write any text already stay as they are.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and not _takes_any(stream):
            with suppress(OSError, ValueError):  # what cannot be flushed, or is closed, fails later
                stream.reconfigure(errors="backslashreplace")


def _takes_any(stream: TextIOWrapper) -> bool:
    try:
        _ANY.encode(stream.encoding, stream.errors or "strict")
    except UnicodeEncodeError:
        return False
    return True

"""Words that depend on a number."""

from __future__ import annotations


def counted(count: int, one: str, more: str | None = None) -> str:
    """``1 image``, ``2 images``.

    Args:
        count: how many.
        one: what one is called.
        more: what any other number of them is; None adds an s.
    """
    return f"{count} {one if count == 1 else more or one + 's'}"

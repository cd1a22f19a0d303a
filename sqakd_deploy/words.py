"""Words that depend on a number."""

from __future__ import annotations


def counted(count: int, one: str) -> str:
    """``1 image``, ``2 images``.

    Args:
        count: how many.
        one: what one is called.
    """
    return f"{count} {one if count == 1 else one + 's'}"

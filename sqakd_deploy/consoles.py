"""Where people read results and progress."""

from __future__ import annotations

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given.

    Names and paths are people's own: ``[a]`` in one is no style, and ``:cat:`` no picture.
    """
    return Console(stderr=stderr, markup=False, emoji=False)

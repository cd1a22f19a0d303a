"""Where people read results and progress."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Console

from sqakd_deploy.strict_json import strict


def console(*, stderr: bool = False) -> Console:
    """A console that prints what it is given.

    Names and paths are people's own: ``[a]`` in one is no style, and ``:cat:`` no picture.
    """
    return Console(stderr=stderr, markup=False, emoji=False)


def print_json(values: Any) -> None:
    """Print values on stdout as one document of strict JSON.

    It is flushed here, so that a reader who has left (``| head``) ends the command without a
    traceback.
    """
    click.echo(strict(values, indent=2))

"""Where people read results and progress."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO
from typing import Any, TypeAlias

import click
from rich.console import Console
from rich.table import Table

from sqakd_deploy.strict_json import strict

WIDTH = 100
"""Characters in a line of what is no terminal's."""

Parts: TypeAlias = Iterable[Table | str]


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


def show(out: Console, parts: Parts) -> None:
    """Print tables, and lines, which are not broken: programs read them, too."""
    for part in parts:
        if isinstance(part, str):
            out.print(part, highlight=False, soft_wrap=True)
        else:
            out.print(part)


def as_text(parts: Parts) -> str:
    """The same without colours, 100 characters wide."""
    paper = StringIO()
    show(Console(file=paper, width=WIDTH, color_system=None, markup=False, emoji=False), parts)
    return paper.getvalue().rstrip("\n")

"""What options take that click has no type for. Imports click alone, as the command line does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

EMPTY = "wanted a name or a path, got an empty text: is a variable of the shell unset?"


class _Text(click.types.StringParamType):
    """Text that says something."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "":
            self.fail(EMPTY, param, ctx)
        return str(super().convert(value, param, ctx))


class _Path(click.Path):
    """A path, which empty text is not: to Python that is the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail(EMPTY, param, ctx)
        return super().convert(value, param, ctx)


class Finite(click.FloatRange):
    """A range that infinity is outside of, and NaN, which compares with nothing."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"wanted a finite number, got {value}", param, ctx)
        return number


TEXT = _Text()
EXISTING = _Path(path_type=Path)
FILE = _Path(path_type=Path, dir_okay=False)

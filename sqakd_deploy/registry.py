"""A table of named things that refuses duplicates and explains misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import takewhile
from operator import eq
from typing import Generic, TypeVar

from sqakd_deploy.errors import SpecError, SqakdError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to values of one kind.

    Args:
        kind: what the values are, in the singular; used in messages ("method", "model").
        error: the error class raised on a miss.
    """

    def __init__(self, kind: str, error: type[SqakdError] = SpecError) -> None:
        self.kind = kind
        self._error = error
        self._values: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Add ``value`` under ``name`` and return it.

        Raises:
            ValueError: if the name is taken; a second registration never replaces the first.
        """
        if name in self._values:
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self._values[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        try:
            return self._values[name]
        except KeyError:
            raise self._error(unknown_name(self.kind, name, list(self))) from None

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[tuple[str, T]]:
        """Names and values, sorted by name."""
        return ((name, self._values[name]) for name in self)


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """Message for a name that is not in a list: the nearest name, and all there are."""
    near = _nearest(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    there_are = ", ".join(known) if known else "none"
    return f"unknown {kind} {name!r}.{hint} There are: {there_are}."


def _nearest(name: str, known: list[str]) -> str | None:
    """Of the names that are like one, that which begins most alike: abbreviations lack the end."""
    close = difflib.get_close_matches(name, known)
    return max(close, key=lambda other: sum(takewhile(bool, map(eq, name, other))), default=None)

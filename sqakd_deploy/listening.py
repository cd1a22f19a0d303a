"""What a long job tells whoever watches it; the command line draws it, the API may ignore it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it needs torch, which a device that files are measured on may not have
    from sqakd_deploy.training.fitting import Step


class Listener:
    """Hears of a run's progress; every method does nothing unless overridden."""

    def message(self, text: str) -> None:
        """A sentence for the log."""

    def start(self, task: str, total: int) -> None:
        """A task of ``total`` units begins; one runs at a time."""

    def advance(self, done: int, step: Step | None = None) -> None:
        """``done`` units of the running task are done; ``step`` has figures where it trains."""

    def finish(self) -> None:
        """The running task ended."""


def told(listener: Listener, task: str) -> Callable[[int, int], None]:
    """A callback for work that tells (done, total): the task begins when it is first called."""
    started = False

    def progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            listener.start(task, total)
        started = True
        listener.advance(done)

    return progress

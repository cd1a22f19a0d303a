"""What a long job tells whoever watches it; the command line draws it, the API may ignore it."""

from __future__ import annotations

from collections.abc import Callable

from sqakd_deploy.distillation import Step

OnStep = Callable[[Step], None]


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

    def on_step(self, step: Step) -> None:
        """A training step, as progress of the running task."""
        self.advance(step.epoch * step.steps + step.step + 1, step)

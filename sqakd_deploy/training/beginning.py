"""Whether training helped: the student after it, against the one that it began with."""

from __future__ import annotations

from torch import nn

from sqakd_deploy.data import ImageData
from sqakd_deploy.data.fitted import limited
from sqakd_deploy.evaluate import divergence, predict
from sqakd_deploy.runs import still_batches
from sqakd_deploy.words import counted

MOST = 1024
"""Held-out images that it is seen on: less than a hundredth of an epoch of 50,000 takes."""

_WORSE, _LEAST = 1.1, 1e-3
"""So many times the divergence and more is no chance, from so many nats on."""


class Beginning:
    """How far a student is from its teacher before and after training, on held-out images.

    Both times as it is simulated in training: what integers round otherwise is far less. Before
    training its ranges are set, and BatchNorm's statistics are the teacher's still: a student of
    ``--epochs 0``, which estimates them anew, is nearer than that.

    Args:
        teacher: in evaluation mode.
        data: the held-out part is used.
    """

    def __init__(self, teacher: nn.Module, data: ImageData) -> None:
        part = limited(data.test, MOST)
        self.count = len(part)
        self._batches = still_batches(part, data.preprocessing)
        self._teacher = teacher
        self._before: float | None = None

    def calibrated(self, student: nn.Module) -> None:
        """To be called before the first step."""
        self._targets = predict(self._teacher, self._batches)
        self._before = divergence(predict(student, self._batches), self._targets)

    def regret(self, student: nn.Module) -> str | None:
        """What to say of a student that training took further from its teacher."""
        if self._before is None:
            return None
        after = divergence(predict(student, self._batches), self._targets)
        if not after > max(_WORSE * self._before, _LEAST):
            return None
        return (
            f"training ended below where it began: on {counted(self.count, 'held-out image')} the "
            f"KL from the teacher is {after:.2g} nats, and was {self._before:.2g} before the "
            "first step; train longer (--epochs), or at a lower rate (--lr)"
        )

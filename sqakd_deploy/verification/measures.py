"""How alike two sets of answers are, in numpy."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]

_RESOLUTION = 640 * 2.0**-23
"""Least step, as a share of the largest answer: a tenth of it is 64 units of float32's last place,
and sums of some thousand terms on top of a large bias were 13 off."""


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy in percent."""
    return float(100.0 * np.mean(logits.argmax(axis=1) == labels))


def agreement(logits: Logits, reference: Logits) -> float:
    """Images for which both give the same top-1 answer, in percent; needs no label."""
    return float(100.0 * np.mean(logits.argmax(axis=1) == reference.argmax(axis=1)))


def range_step(logits: Logits) -> tuple[float, str]:
    """The step of 8 bits over all logits, for outputs in float.

    Answers that lie close together, far from 0, as those of a regression do, are told apart only as
    far as float32 tells them apart.
    """
    spread = float(logits.max() - logits.min()) or 1.0  # all equal: any step will do
    step, least = spread / 255, _RESOLUTION * float(np.abs(logits).max())
    if least > step:
        return least, "what float32 resolves of the logits"
    return step, "1/255 of the logits' range"

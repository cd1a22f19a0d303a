"""How alike two sets of answers are, in numpy."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy in percent."""
    return float(100.0 * np.mean(logits.argmax(axis=1) == labels))


def agreement(logits: Logits, reference: Logits) -> float:
    """Images for which both give the same top-1 answer, in percent; needs no label."""
    return float(100.0 * np.mean(logits.argmax(axis=1) == reference.argmax(axis=1)))

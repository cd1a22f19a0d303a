"""How alike two sets of answers are, in numpy."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]

_RESOLUTION = 640 * 2.0**-23
"""Least step, as a share of the largest answer: a tenth of it is 64 units of float32's last place,
and sums of some thousand terms on top of a large bias were 13 off."""

TIE = 0.01
"""Logits no farther apart than this tie (steps of the output). Those on the output's grid are equal
or a step apart; float ones are sums of few distinct numbers at 1 bit, and many are equal before
float32 rounds them. It moved a 1-bit student's logits by 3e-5 steps at most, of either kind."""


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy in percent."""
    return float(100.0 * np.mean(logits.argmax(axis=1) == labels))


def agreement(logits: Logits, reference: Logits) -> float:
    """Images for which both give the same top-1 answer, in percent; needs no label.

    The order of classes decides ties; what is said of a file goes by :func:`answers`.
    """
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


def tied(reference: Logits, step: float) -> NDArray[np.bool_]:
    """Classes that are the answer to an image ``(N, K)``: the largest logit, and what ties with it.

    Args:
        reference: logits ``(N, K)`` of the student.
        step: of its output (logits).
    """
    largest = reference.max(axis=1, keepdims=True).astype(np.float64)
    found: NDArray[np.bool_] = reference >= largest - TIE * step
    return found


def answers(logits: Logits, reference: Logits, step: float) -> NDArray[np.int64]:
    """Top-1 answers ``(N,)``; the student's where they are one of those that tie in the student.

    Which of several equal logits is the largest is decided by the last bit of float32 sums, or by
    the order of classes, and a runtime that adds in another order decides otherwise. Only ties of
    the student count: a file cannot excuse an answer by its own logits, and an answer a step below
    the student's largest is a wrong one.

    Args:
        logits: of the file ``(N, K)``.
        reference: of the student ``(N, K)``.
        step: of the student's output (logits).
    """
    given, own = logits.argmax(axis=1), reference.argmax(axis=1)
    equal = np.take_along_axis(tied(reference, step), given[:, None], axis=1)[:, 0]
    return np.where(equal, own, given)

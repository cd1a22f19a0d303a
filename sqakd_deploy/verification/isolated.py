"""Every quantised tensor on its own: what the student makes of the codes that the runtime had.

A difference is handed down to all tensors behind it, and deep students of large images amplify the
rounding of float32 until every image differs somewhere, in PyTorch against itself as well. So the
student is run layer by layer on the *runtime's* codes
(:func:`~sqakd_deploy.verification.isolating.isolate`): each quantizer's answer is compared with the
runtime's code, and then replaced by it. Nothing is handed down, and every layer is held to its own
arithmetic, on all images.

In exact arithmetic, what the student rounds lies inside the interval that the runtime's code stands
for. How far outside it lies (:attr:`Isolated.outside`) tells rounding from faults: float32 sums in
another order move a value a little, and only one beside the border of two codes then falls on the
other side; a wrong kernel, constant or operator knows nothing of borders. The answers are held to
the codes before them in the same way.

Every proof does so on a few images: a bound on logits, which must leave room for what a student
does to its own rounding, lets a shifted padding or exchanged colours through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.exporting import Runtime, Session
from sqakd_deploy.verification.onnx_layers import OnnxFile

BORDER = 1e-2
"""Most that rounding leaves outside (steps): half an accumulator's step where a float bias becomes
int32; without one 5e-5 was the most in fourteen families. QONNX's executor adds the zero-point
before it rounds: 8e-6."""

LOGITS_BORDER = 0.1
"""Most that rounding moves answers, given the codes before them (steps): 1e-4 for quantised ones,
more where float sums of many terms cancel."""

IMAGES = 8
"""Images that every proof runs layer by layer: those whose answers are farthest off."""


@dataclass(frozen=True)
class Isolated:
    """A quantised tensor of a file, computed from the runtime's own codes before it.

    Attributes:
        name: of its quantizer.
        codes: count of codes compared.
        differing: count of those that are not the student's.
        largest: of the differences (steps).
        outside: how far the student's value before rounding lies outside the interval that the
            runtime's code stands for, at most (steps). Rounding alone leaves next to nothing.
    """

    name: str
    codes: int
    differing: int
    largest: int
    outside: float

    def fault(self, stage: str) -> str:
        """What is wrong with it in a stage, in words."""
        return (
            f"wrong on its own: {self.name} ({stage}): {self.differing} of {self.codes} codes, up "
            f"to {self.outside:.2f} steps beyond the border"
        )


@dataclass(frozen=True)
class IsolatedReport:
    """All quantised tensors of a file in one way of running it.

    Attributes:
        images: compared.
        tensors: in topological order.
        unseen: quantizers that the file does not have, or that cannot be read without changing its
            answers; the student's own codes stand in for theirs.
        logits: largest error of the answers, from the codes before them (steps of the output).
        programs: copies of the file that the codes were read from.
        unread: those of the unseen that cannot be read: a code beside a border may be another in
            the student than in the runtime.
        moved: how far the answers of those copies are from the file's, at most (steps of 8 bits
            over their range; :data:`~sqakd_deploy.verification.taps.NOISE`).
    """

    images: int
    tensors: tuple[Isolated, ...]
    unseen: tuple[str, ...]
    logits: float = 0.0
    programs: int = 1
    unread: tuple[str, ...] = ()
    moved: float = 0.0

    @property
    def codes(self) -> int:
        """Codes compared, of all tensors."""
        return sum(tensor.codes for tensor in self.tensors)

    @property
    def differing(self) -> int:
        """Codes that are not the student's, of all tensors."""
        return sum(tensor.differing for tensor in self.tensors)

    @property
    def largest(self) -> int:
        """Largest difference of a code (steps)."""
        return max((tensor.largest for tensor in self.tensors), default=0)

    @property
    def decides(self) -> bool:
        """Whether a faulty tensor is proof: codes of several programs need not fit together, nor
        the runtime's those of the student, where it is not seen what the runtime made of them."""
        return self.programs == 1 and not self.unread

    @property
    def faulty(self) -> tuple[Isolated, ...]:
        """Tensors that differ by more than rounding."""
        return tuple(tensor for tensor in self.tensors if not tensor.outside <= BORDER)

    @property
    def wrong_logits(self) -> bool:
        """Whether the answers are off by more than rounding."""
        return not self.logits <= LOGITS_BORDER

    def faults(self, stage: str) -> list[str]:
        """What is wrong in a stage, a line each, whether or not it is proof."""
        found = [tensor.fault(stage) for tensor in self.faulty]
        if self.wrong_logits:
            found.append(
                f"wrong on their own: logits ({stage}): up to {self.logits:.2f} steps off what the "
                "codes before them give"
            )
        return found

    @property
    def worst(self) -> Isolated | None:
        """The tensor whose values lie farthest outside their codes' intervals."""
        return max(self.tensors, key=lambda tensor: tensor.outside, default=None)


SIMULATED = "PyTorch, as trained"
"""The stage that the student itself is, simulating its integers in float32."""


class Isolator(Protocol):
    """Runs a student layer by layer on codes that were computed elsewhere."""

    def __call__(
        self,
        file: OnnxFile,
        runtime: Runtime,
        images: NDArray[np.float32],
        optimize: bool = True,
        session: Session | None = None,
    ) -> IsolatedReport:
        """On a runtime's codes.

        Args:
            file: that it runs.
            runtime: which.
            images: ``(M, C, H, W)``.
            optimize: let the runtime rewrite the graph.
            session: the file opened so; None opens it.
        """

    def simulated(self, images: NDArray[np.float32]) -> IsolatedReport:
        """The student as it was trained, on the codes of its integers.

        Args:
            images: ``(M, C, H, W)``.
        """

"""Training curves for TensorBoard, an extra: ``pip install 'sqakd-deploy[tensorboard]'``."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path

from sqakd_deploy.errors import SpecError
from sqakd_deploy.training.fitting import Step

FOLDER = "tensorboard"
_EVERY = 20  # steps; curves of millions of points are slow to look at


def check_installed() -> None:
    """Refuse before any work.

    Raises:
        SpecError: if TensorBoard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise SpecError(
            "--tensorboard: tensorboard is not installed; "
            "pip install 'sqakd-deploy[tensorboard]', or leave the option out"
        )


class Curves:
    """Writes a training's figures into a run folder, as a context.

    Args:
        run: the folder; ``tensorboard --logdir`` reads it or any folder above.
        part: which training of the run it is, "teacher" or "student".
    """

    def __init__(self, run: Path, part: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra, see the module's docstring

        # A resumed training writes a file of its own; TensorBoard joins them by step.
        self._writer = SummaryWriter(str(run / FOLDER / part), flush_secs=10)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # a full disk, which was said when the first point did not fit
            self._writer.close()

    def add(self, step: Step) -> None:
        """Every few steps, and at the end of an epoch: a point of each curve."""
        last = step.step + 1 == step.steps
        if step.step % _EVERY and not last:
            return
        at = step.epoch * step.steps + step.step + 1
        figures = {
            "loss": step.loss,
            step.target: step.agreement,
            "learning rate": step.lr,
            "images per second": step.images_per_second,
        }
        for name, value in figures.items():
            self._writer.add_scalar(name, value, at)

"""torch's modes: those that a script left on around a call must not reach the arithmetic here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_plain_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Call a function with gradients on, and without ``autocast`` or ``inference_mode``.

    Under autocast a student would be calibrated and compared in bfloat16, which no file computes
    in; without gradients it could not learn.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    modes.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run

"""What code did that cannot be traced, and what to write in its place."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import torch

from sqakd_deploy.tracing import sized_tracer

TRANSFORMS = str(Path("torchvision") / "transforms") + os.sep
_LIBRARIES = (str(Path(torch.__file__).parent) + os.sep, sized_tracer.__file__)
_STAND_IN = re.compile(r"<class '[\w.]*_SizedProxy'>|\b_SizedProxy\b")  # is no tensor for a person


def is_library(text: str) -> bool:
    """Whether a line of a stack trace, or the path in it, is no code of a model's own."""
    return TRANSFORMS in text or any(library in text for library in _LIBRARIES)


def first_line(error: BaseException) -> str:
    """Of an error's text, or its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """An error's first line, and where in the model it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not is_library(f.filename) and f.name != "trace"]
    frame = (outside or frames)[-1]
    what = _STAND_IN.sub("a stand-in for a tensor", first_line(error))
    return f"{what} (at {Path(frame.filename).name}:{frame.lineno}: {frame.line})"


def advice(error: BaseException) -> str:
    """What to write instead of code that raised an error when it was traced."""
    frames = traceback.extract_tb(error.__traceback__)
    if any(TRANSFORMS in frame.filename for frame in frames):
        return (
            "torchvision's transforms cannot be traced: prepare images before the model does, or "
            "write (x - mean) / std there."
        )
    if _STAND_IN.search(str(error)):
        return "Tracing has no tensors: leave out what asks for the type of one."
    return "Branch on self.training or constants only, not on tensor values."

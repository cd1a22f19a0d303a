"""JSON as its standard has it, without the ``NaN`` and ``Infinity`` that Python writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def strict(values: Any, *, indent: int | None = None) -> str:
    """Values as JSON; numbers that are not finite become ``null``.

    Args:
        values: plain ones: mappings, sequences, numbers, texts, None.
        indent: spaces a level; None writes one line.
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(held) for held in value]
    return value

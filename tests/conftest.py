"""Settings that every test shares."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Tests run in random order; each starts from the same generator state."""
    torch.manual_seed(0)

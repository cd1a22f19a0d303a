"""Settings that every test shares."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import pytest
import torch

# The networks here are tiny: threads cost more than they save, and much more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Tests run in random order; each starts from the same generator state."""
    torch.manual_seed(0)

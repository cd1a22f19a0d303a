"""Settings that every test shares."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import pytest
import torch
from hypothesis import settings

# A change is not to fail for an example that the next run would not draw; people's own runs do
# draw new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# The networks here are tiny: threads cost more than they save, and much more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's cache, or finds what another left in one."""
    monkeypatch.setenv("SQAKD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Tests run in random order; each starts from the same generator state."""
    torch.manual_seed(0)

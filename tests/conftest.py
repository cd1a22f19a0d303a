"""Settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

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

gc.disable()


def pytest_collection_finish() -> None:
    """What was imported stays: the collector would take a tenth of the time to look through it for
    garbage, at every import and then from test to test."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where each test's cache would be: a folder for each of thousands costs minutes to make,
    to number and to remove, and few tests write to theirs."""
    home = tmp_path_factory.mktemp("caches")
    return (home / str(number) for number in count())


@pytest.fixture(autouse=True)
def _own_cache(_caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes to the user's cache, or finds what another left in one."""
    monkeypatch.setenv("SQAKD_CACHE", str(next(_caches)))


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Tests run in random order; each starts from the same generator state."""
    torch.manual_seed(0)

"""Kernels that a killed run left half-written, and failures of the compiler."""

from __future__ import annotations

import math
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sqakd_deploy.errors import TrainingError
from sqakd_deploy.training import acceleration
from sqakd_deploy.training.acceleration import Acceleration
from sqakd_deploy.training.kernels import compiling, is_whole, remove_broken


def library() -> bytes:
    """What counts of a shared library: its header, and three sections of 64 bytes at the end."""
    header = bytearray(64)
    header[:6] = b"\x7fELF" + bytes([2, 1])  # 64 bits, lowest byte first
    struct.pack_into("<Q", header, 40, 1000)
    struct.pack_into("<HH", header, 58, 64, 3)
    return bytes(header).ljust(1000 + 3 * 64, b"\x01")


def test_real_libraries_are_whole() -> None:
    paths = [Path(module.__file__) for module in (math, torch._C) if hasattr(module, "__file__")]
    assert all(is_whole(path) for path in paths if path.suffix == ".so")


def kernel(folder: Path, name: str, content: bytes, age: float = 100.0) -> Path:
    path = folder / name[:2] / f"{name}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_kernels_that_are_not_whole_are_removed(tmp_path: Path) -> None:
    whole = library()
    kept = [
        kernel(tmp_path, "aa", whole),
        kernel(tmp_path, "ab", b"no ELF file, for instance of macOS"),
        kernel(tmp_path, "ac", b"", age=1.0),  # being written, perhaps
    ]
    broken = [
        kernel(tmp_path, "ba", b""),
        kernel(tmp_path, "bb", whole[:20]),
        kernel(tmp_path, "bc", whole[:64]),
        kernel(tmp_path, "bd", whole[: len(whole) // 2]),
        kernel(tmp_path, "be", whole[:-1]),
    ]
    assert sorted(remove_broken(tmp_path)) == sorted(broken)
    assert sorted(tmp_path.glob("*/*.so")) == sorted(kept)
    assert remove_broken(tmp_path / "nowhere") == []


def test_who_compiles_removes_them_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(acceleration, "remove_broken", lambda: asked.append(True))
    how = Acceleration(compile=False, bf16=False, channels_last=False, reason="")
    how.compiled(nn.Linear(2, 2), whole=True)
    assert not asked
    Acceleration(compile=True, bf16=False, channels_last=False, reason="").compiled(
        nn.Linear(2, 2), whole=True
    )
    assert asked


@pytest.mark.parametrize("cut", [True, False])
def test_a_kernel_that_cannot_be_loaded_is_named(cut: bool, tmp_path: Path) -> None:
    path = kernel(tmp_path, "aa", b"" if cut else library())

    def backend(graph: object, inputs: object) -> None:
        raise ImportError(f"ImportError: {path}: file too short")

    model = torch.compile(nn.Linear(2, 2), backend=backend)  # type: ignore[arg-type]
    text = r"was cut short.*it is removed: start again" if cut else r"compiling failed: .*aa\.so"
    with pytest.raises(TrainingError, match=text) as caught, compiling():
        model(torch.ones(1, 2))
    assert "\n" not in str(caught.value)
    assert path.exists() is not cut
    assert cut or is_whole(path)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), compiling():
        raise ZeroDivisionError

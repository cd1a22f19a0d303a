"""What the processor can do with 8-bit integers."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

INTEGER_FEATURES = {
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
    "asimddp": "dot product",
    "i8mm": "I8MM",
}
"""Linux's names of the instructions that multiply and sum int8, with those people use."""


@dataclass(frozen=True)
class Cpu:
    """A processor.

    Attributes:
        name: as it calls itself.
        cores: that this process may use.
        integer: its instructions for int8, by the names people use; None if they are not known.
    """

    name: str
    cores: int
    integer: tuple[str, ...] | None


def describe_cpu(cpuinfo: Path = _CPUINFO) -> Cpu:
    """The processor of this machine; its instructions are known on Linux alone."""
    name = platform.processor() or platform.machine()
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Cpu(name, _cores(), None)
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    found = tuple(shown for flag, shown in INTEGER_FEATURES.items() if flag in flags)
    return Cpu(facts.get("model name", name), _cores(), found)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

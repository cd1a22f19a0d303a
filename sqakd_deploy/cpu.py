"""What the processor can do with 8-bit integers."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

_CPUINFO = Path("/proc/cpuinfo")

INTEGER_FEATURES = {
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
    "asimddp": "dot product",
    "i8mm": "I8MM",
}
"""Linux's names of the instructions that multiply and sum int8, with those people use."""

_X86 = ("x86_64", "amd64", "i386", "i686")
_VNNI = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")

Vnni: TypeAlias = Literal["vnni", "no vnni", "unknown", "not x86"]


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
    facts = _facts(cpuinfo)
    if facts is None:
        return Cpu(name, _cores(), None)
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    found = tuple(shown for flag, shown in INTEGER_FEATURES.items() if flag in flags)
    return Cpu(facts.get("model name", name), _cores(), found)


def this_cpu(cpuinfo: Path = _CPUINFO, machine: str | None = None) -> Vnni:
    """Whether this machine's CPU has VNNI."""
    if (machine or platform.machine()).lower() not in _X86:
        return "not x86"
    flags = (_facts(cpuinfo) or {}).get("flags", "").split()
    if not flags:
        return "unknown"
    return "vnni" if any(flag in flags for flag in _VNNI) else "no vnni"


def _facts(cpuinfo: Path) -> dict[str, str] | None:
    """What Linux says of the first core; None elsewhere."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

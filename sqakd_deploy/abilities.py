"""What an exporter may say of its files, and a session hand out, beyond what every one must."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import SpecError
from sqakd_deploy.exporting import Exporter, Session


@runtime_checkable
class PackingExporter(Exporter, Protocol):
    """An exporter that can store weights below a byte each.

    Attributes:
        packs: weight bits (1 to 7) that its runtime restores at load, once and for all, so that
            the kernels are those of the unpacked file.
    """

    packs: frozenset[int]


@runtime_checkable
class FormalExporter(Exporter, Protocol):
    """An exporter that says what a person may ask for, so that the rest is refused at once.

    Attributes:
        suffixes: that a file's name may have; the first is the usual one.
        opsets: that a file may have.
    """

    suffixes: tuple[str, ...]
    opsets: range


@runtime_checkable
class AccumulatingExporter(Exporter, Protocol):
    """An exporter that says how wide its runtime's sums are; others' are int32.

    Attributes:
        accumulator_bits: of a sum of products of codes; None where it is made as wide as it must.
    """

    accumulator_bits: int | None


@runtime_checkable
class ReadableSession(Session, Protocol):
    """A session that runs a file node by node, as written, and hands out what it computes."""

    def read(self, images: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
        """Logits of images ``(N, C, H, W)``, and values of the file behind them, ``(N, K + …)``.

        Args:
            images: preprocessed.
            names: of values in the file; each is laid out as a row for each image.
        """
        ...


def packs_of(exporter: Exporter) -> frozenset[int]:
    """Weight bits that an exporter can pack; none if it does not say."""
    return exporter.packs if isinstance(exporter, PackingExporter) else frozenset()


def accumulator_bits_of(exporter: Exporter) -> int | None:
    """Bits of a sum of products of codes, None where any sum fits."""
    return exporter.accumulator_bits if isinstance(exporter, AccumulatingExporter) else 32


def check_form(exporter: Exporter, path: Path, opset: int | None) -> None:
    """Refuse a name or an opset that no file of a target has; one that says nothing takes any.

    Args:
        exporter: of the target.
        path: of the file to be.
        opset: that is asked for; None leaves it to the exporter.

    Raises:
        SpecError: if so.
    """
    if not isinstance(exporter, FormalExporter):
        return
    if path.suffix not in exporter.suffixes:
        wanted = " or ".join(exporter.suffixes)
        raise SpecError(
            f"{path}: wanted a name that ends in {wanted}, by which other commands know the file; "
            f"for instance {_renamed(path, exporter.suffixes)}{_OTHERS.get(path.suffix, '')}"
        )
    if opset is not None and opset not in exporter.opsets:
        raise SpecError(
            f"opset: wanted {exporter.opsets[0]} to {exporter.opsets[-1]} for target "
            f"{exporter.name!r}, got {opset}; leave it out for the lowest that will do"
        )


_OTHERS = {".xml": "; .xml is OpenVINO IR, which --target openvino writes"}
"""Of whom a suffix is that a target does not know."""


def _renamed(path: Path, suffixes: Sequence[str]) -> str:
    """A name like a file's that has one of the suffixes: in place of its own if that is like it."""
    near = get_close_matches(path.suffix, suffixes, n=1)
    return path.with_suffix(near[0]).name if near else f"{path.name}{suffixes[0]}"

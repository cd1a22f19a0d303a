"""What a student answered, in one file: enough to verify an export without torch."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import DataError
from sqakd_deploy.files import replacing
from sqakd_deploy.verification.constants import Constants
from sqakd_deploy.verification.measures import Logits, range_step
from sqakd_deploy.verification.metadata import KEYS
from sqakd_deploy.verification.operators import Operators
from sqakd_deploy.verification.running import Expected
from sqakd_deploy.verification.sizes import Sizes

BATCH = 64
"""Images that run at a time where a file does not say otherwise."""

_CONSTANT, _METADATA, _TENSOR, _GRID = "constant", "metadata", "tensor", "grid"
_OPERATOR = "operator"
_SEPARATOR = "|"  # in no name of a module


@dataclass(frozen=True)
class Tensor:
    """The codes that a student gave a quantised tensor.

    Attributes:
        codes: uint8 ``(M, …)``, counted from the lowest code of their type.
        scale: of the grid.
        zero_point: counted as the codes.
    """

    codes: NDArray[np.uint8]
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Reference:
    """Images and the student's answers to them.

    Attributes:
        name: who answered, as the stage is called.
        batches: preprocessed images ``(N, C, H, W)`` float32.
        logits: ``(N, K)`` of all of them.
        labels: ``(N,)``, where known.
        step: that logit errors are counted in, and where it comes from; None if not known.
        sizes: of the student; None if not known.
        constants: of every layer; None if not known.
        operators: what each of its nodes is, by its name; None if not known.
        metadata: what the file should say of itself, JSON by key; None if not known.
        tensors: by the quantizer's name; None if not known.
        tensor_images: indices ``(M,)`` of the images that the tensors are of.
    """

    name: str
    batches: tuple[NDArray[np.float32], ...]
    logits: Logits
    labels: NDArray[np.int64] | None = None
    step: tuple[float, str] | None = None
    sizes: Sizes | None = None
    constants: Constants | None = None
    metadata: Mapping[str, str] | None = None
    tensors: Mapping[str, Tensor] | None = None
    tensor_images: NDArray[np.int64] | None = None
    operators: Operators | None = None

    def expected(self) -> Expected:
        """What the stages of a file are compared with."""
        step = self.step or range_step(self.logits)
        return Expected(self.name, self.logits, self.labels, step, self.sizes)

    def images(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some of the images, as one array."""
        starts = np.cumsum([0, *(len(batch) for batch in self.batches)])
        batch_of = np.searchsorted(starts, indices, side="right") - 1
        pairs = zip(batch_of, indices, strict=True)
        return np.stack([self.batches[b][i - starts[b]] for b, i in pairs])


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as ``.npz``: ``images``, ``logits`` and what else is known.

    Raises:
        DataError: if the file cannot be written.
    """
    arrays: dict[str, Any] = {
        "images": np.concatenate(reference.batches),
        "logits": reference.logits,
    }
    if reference.labels is not None:
        arrays["labels"] = reference.labels
    if reference.step is not None:
        arrays["step"], arrays["step_source"] = map(np.array, reference.step)
    if reference.sizes is not None:
        known = [size for size in astuple(reference.sizes) if size is not None]
        arrays["sizes"] = np.array(known)
    for layer, facts in (reference.constants or {}).items():
        for name, array in facts.items():
            arrays[_SEPARATOR.join((_CONSTANT, layer, name))] = array
    for name, kind in (reference.operators or {}).items():
        arrays[_SEPARATOR.join((_OPERATOR, name))] = np.array(kind)
    for key, text in (reference.metadata or {}).items():
        arrays[_SEPARATOR.join((_METADATA, key))] = np.array(text)
    if reference.tensor_images is not None:
        arrays["tensor_images"] = reference.tensor_images
    for name, tensor in (reference.tensors or {}).items():
        arrays[_SEPARATOR.join((_TENSOR, name))] = tensor.codes
        grid = np.array([tensor.scale, tensor.zero_point], np.float64)
        arrays[_SEPARATOR.join((_GRID, name))] = grid
    try:
        with replacing(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)
    except OSError as error:
        raise DataError(f"cannot write the reference {path}: {error.strerror}") from error


def load_reference(path: Path) -> Reference:
    """Read a reference; ``images`` and ``logits`` are all that it needs.

    Raises:
        DataError: if it is missing, damaged, or lacks either.
    """
    if path.is_file() and not zipfile.is_zipfile(path):  # numpy's error advises to unpickle
        raise DataError(
            f"{path} is no reference, or damaged: wanted an .npz of images and logits, as "
            "--save-reference writes"
        )
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except OSError as error:
        raise DataError(f"cannot read the reference {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no reference, or damaged: {error}; wanted an .npz of images and logits, "
            "as --save-reference writes"
        ) from error
    _check(arrays, path)
    try:
        reference = _reference(arrays)
        if reference.constants is not None and reference.operators is None:
            raise ValueError("an earlier version wrote it, which did not name the operators")
        _check_tensors(reference)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no reference, or damaged: {error}; save it again with --save-reference"
        ) from error
    return reference


def _reference(arrays: Mapping[str, NDArray[Any]]) -> Reference:
    images = arrays["images"].astype(np.float32, copy=False)
    labels = arrays.get("labels")
    return Reference(
        "saved reference",
        tuple(images[i : i + BATCH] for i in range(0, len(images), BATCH)),
        arrays["logits"].astype(np.float32, copy=False),
        None if labels is None else labels.astype(np.int64),
        (float(arrays["step"]), str(arrays["step_source"])) if "step" in arrays else None,
        Sizes(*(int(size) for size in arrays["sizes"])) if "sizes" in arrays else None,
        _constants(arrays) or None,
        _texts(arrays, _METADATA) or None,
        _tensors(arrays) or None,
        arrays.get("tensor_images"),
        _texts(arrays, _OPERATOR) or None,
    )


def _check_tensors(reference: Reference) -> None:
    """Refuse what fits no images, or counts errors in no unit.

    Raises:
        ValueError: if so.
    """
    if reference.step is not None and not 0 < reference.step[0] < math.inf:
        raise ValueError(f"wanted a step above 0, got {reference.step[0]}")
    for key, text in (reference.metadata or {}).items():
        if key in KEYS:  # others are the user's, in whatever form
            json.loads(text)
    if reference.tensors is None:
        return
    which = reference.tensor_images
    if which is None or which.ndim != 1 or not np.issubdtype(which.dtype, np.integer):
        raise ValueError("wanted tensor_images, the indices of the images that tensors are of")
    if not len(which) or which.min() < 0 or which.max() >= len(reference.logits):
        raise ValueError(f"wanted tensor_images below {len(reference.logits)}, got {which}")
    for name, tensor in reference.tensors.items():
        if len(tensor.codes) != len(which):
            raise ValueError(
                f"{name}: wanted codes of {len(which)} images, got {len(tensor.codes)}"
            )


def _check(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    missing = [name for name in ("images", "logits") if name not in arrays]
    if missing:
        has = ", ".join(sorted(name for name in arrays if _SEPARATOR not in name)) or "nothing"
        raise DataError(f"{path}: wanted arrays images and logits, got {has}")
    counts = {len(arrays[name]) for name in ("images", "logits", "labels") if name in arrays}
    if len(counts) > 1 or not min(counts):
        raise DataError(
            f"{path}: wanted as many logits and labels as images, and at least one; got "
            + ", ".join(f"{n} {arrays[n].shape}" for n in ("images", "logits", "labels")
                        if n in arrays)
        )  # fmt: skip
    if arrays["logits"].ndim != 2 or arrays["images"].ndim < 2 or not arrays["logits"].shape[1]:
        raise DataError(
            f"{path}: wanted images (N, C, H, W) and logits (N, K), got images "
            f"{arrays['images'].shape} and logits {arrays['logits'].shape}"
        )
    for name in ("images", "logits"):
        if arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            raise DataError(f"{path}: {name} hold values that are not finite; save them again")
    labels = arrays.get("labels")
    if labels is not None and not _are_classes(labels):
        raise DataError(
            f"{path}: wanted labels (N,) in whole numbers, got {labels.dtype} {labels.shape}"
        )


def _are_classes(labels: NDArray[Any]) -> bool:
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        return False
    return bool(np.isfinite(labels).all() and (labels == np.floor(labels)).all())


def _constants(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        kind, *names = key.split(_SEPARATOR)
        if kind == _CONSTANT and len(names) == 2:
            found.setdefault(names[0], {})[names[1]] = array
    return found


def _texts(arrays: Mapping[str, NDArray[Any]], wanted: str) -> dict[str, str]:
    keys = {key: key.partition(_SEPARATOR) for key in arrays}
    return {name: str(arrays[key]) for key, (kind, _, name) in keys.items() if kind == wanted}


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    found = {}
    for key, codes in arrays.items():
        kind, *names = key.split(_SEPARATOR)
        if kind == _TENSOR and len(names) == 1:
            scale, zero = arrays[_SEPARATOR.join((_GRID, names[0]))]
            found[names[0]] = Tensor(codes, float(scale), int(zero))
    return found

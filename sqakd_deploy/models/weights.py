"""Weights from files of this package and of others, without ever running their code."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.nonfinite import non_finite_tensor

Message: TypeAlias = Callable[[str], None]
"""Told what a person should know of a file."""

_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "ema",
    "model_ema",
    "ema_state_dict",
    "state_dict_ema",
)
_DEEPEST = 2  # mappings in mappings, as in {"ema": {"module": …}}
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")  # DataParallel, torch.compile, Lightning
_MOST_WRAPPERS = 3  # around each other
_PARTS = (".module.", "._orig_mod.")  # around a part, as PyTorch's ImageNet example wraps features

# What training scripts put beside the weights: plain values, whose unpickling runs no code.
_PLAIN_VALUES: list[Any] = [
    Namespace,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool")),
]
_COUNTER = "num_batches_tracked"
_AVERAGED = "n_averaged"  # which torch.optim.swa_utils.AveragedModel adds to its module's
_PYTHON_OBJECT = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)")  # in torch's refusal
_SAVE_WEIGHTS = (
    "Where the file was made, save the weights alone: torch.save(model.state_dict(), path)"
)
_SHOWN = 5  # keys named in a message, of each kind


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a weight file into ``model``, in place, whole or not at all.

    ``.safetensors`` files hold tensors by name. Other files are read by torch with
    ``weights_only=True`` and may hold the state dict itself or have it under one of the keys of
    training scripts (``state_dict``, ``model``, ``net``, ``ema`` and others); what wrappers such as
    DataParallel put before every name (``module.``, ``_orig_mod.``, ``model.``, ``net.``) is taken
    off, and what they put into names where they wrapped a part. Every parameter and buffer must be
    there with its shape, and no other; only BatchNorm's batch counters, which files older than
    PyTorch 0.4.1 lack, may be missing.

    Args:
        model: the model to change.
        path: the file.

    Raises:
        CheckpointError: if the file is missing, damaged, holds other things than tensors or
            values that are not finite, or belongs to another model.
    """
    load_state(model, read_state_dict(path), path)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    *,
    unless_resized: str | None = None,
    always: bool = False,
) -> int | None:
    """Load tensors by name into ``model``, as :func:`load_weights` does.

    Args:
        model: the model to change.
        state: the tensors, perhaps with a wrapper's prefix.
        path: where they are from, for the message.
        unless_resized: a layer that stays as it is where it has another number of outputs.
        always: it does so with any number.

    Returns:
        That other number of outputs; None where all was loaded.

    Raises:
        CheckpointError: if they belong to another model, naming what differs, or hold values that
            are not finite, naming the first tensor that does.
    """
    wanted = model.state_dict()
    found = _unwrapped(dict(state), wanted)
    counters = {key: value for key, value in wanted.items() if key.endswith(_COUNTER)}
    complete = {**counters, **found}
    outputs = None if unless_resized is None else _resized(unless_resized, complete, wanted, always)
    if outputs is not None:
        own = (f"{unless_resized}.weight", f"{unless_resized}.bias")
        complete |= {key: wanted[key] for key in own if key in wanted}
    problems = _differences(complete, wanted)
    if problems:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Is it of another model, or of another number of classes or channels (--channels)?"
        )
    spoilt = non_finite_tensor(complete, wanted)
    if spoilt is not None:
        raise CheckpointError(f"{path}: weights hold values that are not finite: {spoilt}")
    wanted.update(complete)  # it knows its modules' versions, which MNASNet asks for
    model.load_state_dict(wanted)
    return outputs


def _resized(
    layer: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], same_too: bool
) -> int | None:
    """How many outputs a layer has in a file, if that is all that differs."""
    theirs, ours = found.get(f"{layer}.weight"), wanted.get(f"{layer}.weight")
    if (
        theirs is None
        or ours is None
        or (theirs.shape == ours.shape and not same_too)
        or theirs.shape[1:] != ours.shape[1:]
    ):
        return None
    return len(theirs)


def read_state_dict(path: Path, message: Message = lambda text: None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from any file that :func:`load_weights` takes.

    Args:
        path: the file.
        message: told which was taken of several sets of weights.

    Raises:
        CheckpointError: if the file is missing, damaged or holds no state dict.
    """
    if path.is_dir():
        teacher = path / "teacher.safetensors"
        hint = f"; it is a run: name its {teacher}" if teacher.is_file() else ""
        raise CheckpointError(f"weights {path}: wanted a file, got a folder{hint}")
    if not path.is_file():
        raise CheckpointError(f"weight file {path} does not exist")
    if path.stat().st_size == 0:
        raise CheckpointError(f"weight file {path} is empty")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _find_state_dict(_read_torch(path), path, message)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about file formats; the errors below say more
            with torch.serialization.safe_globals(_PLAIN_VALUES):
                return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files make torch raise anything: 6,000 of them gave nine kinds of exception.
    except Exception as error:
        raise CheckpointError(f"{path} {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    held = _PYTHON_OBJECT.search(str(error))
    if held is not None:
        return (
            f"holds a Python object ({held[1]}) beside tensors, and those are never loaded, "
            f"since they can run code. {_SAVE_WEIGHTS}"
        )
    if "TorchScript" in str(error):
        return f"is a TorchScript program, not a weight file. {_SAVE_WEIGHTS}"
    return (
        f"is truncated, damaged or no PyTorch weight file ({_reason(error)}); "
        "copy or download it again"
    )


def _reason(error: Exception) -> str:
    """The first sentence; torch goes on for a paragraph about unsafe loading."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def _find_state_dict(loaded: Any, path: Path, message: Message) -> dict[str, Tensor]:
    for name, candidate in _candidates(loaded, _NESTED):
        if _is_state_dict(candidate):
            others = _others(loaded, candidate)
            if others:
                message(
                    f"{path} holds several sets of weights: {name!r} is taken, not "
                    f"{', '.join(map(repr, others))}; save another alone to take that"
                )
            return dict(candidate)
    found = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
    raise CheckpointError(
        f"{path} holds no state dict: wanted tensors by name, or such a mapping under "
        f"{', '.join(_NESTED)}; found {found or 'nothing'}"
    )


def _candidates(
    loaded: Any, keys: Iterable[Any] | None, name: str = "", depth: int = _DEEPEST
) -> Iterator[tuple[str, Any]]:
    """What may be weights, and where it lies: the whole, and what is under some keys or, if they
    are None, under any."""
    yield name, loaded
    if isinstance(loaded, Mapping) and depth:
        for key in loaded if keys is None else keys:
            if key in loaded:
                below = f"{name}.{key}" if name else str(key)
                yield from _candidates(loaded[key], keys, below, depth - 1)


def _others(loaded: Any, taken: Mapping[str, Tensor]) -> list[str]:
    """Where there are other sets of about as many tensors."""
    return [
        name
        for name, found in _candidates(loaded, None)
        if _is_state_dict(found) and found is not taken and 2 * len(found) > len(taken)
    ]


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _unwrapped(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take wrappers' prefixes off, unless the model's own names begin so."""
    if _AVERAGED not in wanted:
        found.pop(_AVERAGED, None)
    for prefix in _WRAPPERS * _MOST_WRAPPERS:  # any may be around another
        foreign = all(key.startswith(prefix) for key in found)
        if foreign and not all(key.startswith(prefix) for key in wanted):
            found = {key.removeprefix(prefix): value for key, value in found.items()}
    for part in _PARTS:
        if not any(part in key for key in wanted):
            found = {key.replace(part, "."): value for key, value in found.items()}
    return found


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    reshaped = [
        f"{key} {tuple(found[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds if keys]


def _first(keys: list[str]) -> str:
    more = f", and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more

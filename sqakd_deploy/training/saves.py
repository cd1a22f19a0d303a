"""Training states on disk, so that a killed run goes on where it was, bit for bit.

A save is a folder ``save-000000123`` (the number counts steps) that holds ``model.safetensors``,
``optimizer.safetensors`` and ``position.json``; the last names the checksums of the other two. It
is written under another name and renamed, so that one with its proper name is whole. The two
newest are kept: should the newest be damaged all the same, the one before it serves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_MODEL, _OPTIMIZER, _POSITION = "model.safetensors", "optimizer.safetensors", "position.json"
_KEPT = 2
_RNG = "rng.cpu"
_CUDA_RNG = "rng.cuda"


@dataclass(frozen=True)
class Position:
    """How far a training run is; all counts are of things done.

    Attributes:
        epoch: whole epochs.
        step: steps of the epoch under way.
        loss_sum: of that epoch's steps.
        share_sum: likewise of the agreement (0 to 1).
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    share_sum: float = 0.0


class Saves:
    """The saves of one run.

    Args:
        folder: where they are kept; made when first needed.
        seconds: least time between two saves.
        message: told when a save could not be written or read.
    """

    def __init__(
        self, folder: Path, seconds: float = 30.0, message: Callable[[str], None] | None = None
    ) -> None:
        self.folder = folder
        self.seconds = seconds
        self._message = message or (lambda text: None)
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() - self._last >= self.seconds

    def write(
        self, number: int, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Save; a full disk is reported and costs this save only.

        Args:
            number: steps done since the start, for the order of saves.
            position: within the run.
            model: its parameters and buffers.
            optimizer: its moments, and the state of torch's generators beside them.
        """
        self._last = time.monotonic()
        final = self.folder / f"save-{number:09}"
        partial = self.folder / f".{final.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(_plain(model.state_dict()), partial / _MODEL)
            save_file(_optimizer_tensors(optimizer), partial / _OPTIMIZER)
            facts = {"position": asdict(position), "sha256": _checksums(partial)}
            (partial / _POSITION).write_text(json.dumps(facts), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            self._message(f"could not save to {final}: {error}; the save before it is kept")
            return
        for old in self._all()[:-_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position | None:
        """Put the newest whole save back.

        Returns:
            Where it was, or None if there is no save; a damaged one is reported and passed over.
        """
        for folder in reversed(self._all()):
            try:
                position = _read(folder, model, optimizer)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                self._message(f"{folder} is damaged ({error}); going back to the one before it")
                continue
            self._message(
                f"resuming from {folder}: epoch {position.epoch + 1}, step {position.step + 1}"
            )
            return position
        return None

    def clear(self) -> None:
        """Remove all of them: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("save-*"))


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments as ``<parameter>.<name>``, and the generators' states."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    found = {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, moments in state.items()
        for name, value in moments.items()
        if value is not None
    }
    found[_RNG] = torch.get_rng_state()
    if torch.cuda.is_available():
        found[_CUDA_RNG] = torch.cuda.get_rng_state()
    return _plain(found)


def _checksums(folder: Path) -> dict[str, str]:
    names = (_MODEL, _OPTIMIZER)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


@torch.no_grad()
def _put_back(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill the model's own tensors: ``load_state_dict`` has Brevitas make new parameters, and the
    optimizer would go on with the old ones."""
    own = model.state_dict()
    shapes, saved = ({name: t.shape for name, t in of.items()} for of in (own, state))
    if shapes != saved:  # other shapes may be copied, too: a row to each of several
        raise ValueError("it belongs to another model")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    facts = json.loads((folder / _POSITION).read_text(encoding="utf-8"))
    if facts["sha256"] != _checksums(folder):
        raise ValueError("a checksum does not match")
    position = Position(**facts["position"])
    tensors = load_file(folder / _OPTIMIZER)
    _put_back(model, load_file(folder / _MODEL))
    torch.set_rng_state(tensors.pop(_RNG))
    cuda = tensors.pop(_CUDA_RNG, None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _lay_out_as_parameters(optimizer)
    return position


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused Adam on CPUs goes through memory in order, without a look at strides: a moment in
    another layout than its channels-last weight would meet the wrong elements of it."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                moments[name] = own.copy_(value)

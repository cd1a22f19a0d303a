"""The run folder: what a training run leaves behind, and how it is read back.

::

    config.yaml            the resolved config
    run.json               status (running, interrupted, failed, complete) and results
    metrics.jsonl          one line per epoch
    teacher.safetensors    the float model
    student.safetensors    the student
    last/                  training states for --resume, while the run is not complete
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sqakd_deploy.config import RunConfig, load_config
from sqakd_deploy.data import DATASETS
from sqakd_deploy.errors import CheckpointError, SqakdError
from sqakd_deploy.files import replacing, write_new_text, write_text
from sqakd_deploy.nonfinite import non_finite_tensor
from sqakd_deploy.spec import SPEC_KEY
from sqakd_deploy.strict_json import strict

Status = Literal["running", "interrupted", "failed", "complete"]
CONFIG, STATE, METRICS = "config.yaml", "run.json", "metrics.jsonl"
TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"
LAST = "last"
STUDENT_KEY = "sqakd.student"  # in a file's metadata: checksum_of its run's student
CHECKSUM = "checksum_of_images"  # among a run's facts: ImageData.checksum when it was trained


@dataclass
class Run:
    """An open run folder.

    Attributes:
        path: the folder.
        config: as resolved.
        facts: contents of ``run.json``: status, data facts and results.
        writable: False in all processes but the first: they write nothing.
    """

    path: Path
    config: RunConfig
    facts: dict[str, Any] = field(default_factory=dict)
    writable: bool = True

    @property
    def kind(self) -> str:
        """``student``, or ``teacher`` for a run that trains nothing else."""
        return str(self.facts.get("kind", "student"))

    @property
    def status(self) -> Status:
        """How far the run came."""
        status: Status = self.facts.get("status", "running")
        return status

    def update(self, **facts: Any) -> None:
        """Add facts to ``run.json``.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self.facts.update(facts)
        if not self.writable:
            return
        try:
            write_text(self.path / STATE, strict(self.facts, indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path / STATE}: {error}") from error

    def save(self, model: nn.Module, name: str) -> None:
        """Save a model's state under a name of this folder."""
        if self.writable:
            save_weights(model, self.path / name)

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``; a part that is trained again replaces its lines."""
        if not self.writable:
            return
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if not _supersedes(values, json.loads(line))]
        write_text(path, "\n".join([*kept, strict(values)]) + "\n")


def _supersedes(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether an epoch comes at or before an old line of the same part of the run."""
    return bool(new["part"] == old["part"] and new["epoch"] <= old["epoch"])


def create_run(config: RunConfig, folder: Path | str | None, kind: str = "student") -> Run:
    """Make a new run folder.

    Args:
        config: saved in it.
        folder: where; None picks a free name under ``runs/``.
        kind: ``student``, or ``teacher`` for a run that trains nothing else.

    Raises:
        CheckpointError: if the folder cannot be written or already holds a run.
    """
    label = config.label if kind == "student" else f"{config.base}-{kind}"
    path = Path(folder) if folder else Path("runs") / label
    try:
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path = new_folder(path)
        _take(path, config.to_yaml())
        run = Run(path, config)
        run.update(status="running", kind=kind, started_in=str(Path.cwd()))
    except OSError as error:
        raise CheckpointError(
            f"cannot write the run folder {path}: {error.strerror}; choose another with --output"
        ) from error
    return run


def _take(path: Path, config: str) -> None:
    """Make a folder that of a run: of two starts at once in the same, one gets it."""
    try:
        write_new_text(path / CONFIG, config)
    except FileExistsError:
        raise CheckpointError(
            f"{path} already holds a run: choose another --output, or remove it"
        ) from None


def new_folder(path: Path) -> Path:
    """Make a folder of that name, or with the first free number behind it.

    Whoever makes it has it alone: of two starts at once, one gets the next number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 2
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            candidate = path.with_name(f"{path.name}-{number}")
            number += 1


def open_run(path: Path | str) -> Run:
    """Read a run folder.

    Raises:
        CheckpointError: if it is no run folder, or its files are damaged.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} is no run folder: it has no {CONFIG}; train one first")
    state = path / STATE
    if not state.exists():
        raise CheckpointError(
            f"{state} is missing, which says what the run's images need and how far it came: copy "
            f"it back, or train anew, 'sqakd-deploy train --config {path / CONFIG}'"
        )
    try:
        config = load_config(path / CONFIG, {})
        facts = json.loads(state.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise CheckpointError(f"{STATE} holds no facts by name")
    except (SqakdError, ValueError, OSError) as error:
        raise CheckpointError(f"run {path} is damaged: {error}") from error
    return Run(path, _found_again(config, facts), facts)


def opened(run: Run | Path | str) -> Run:
    """A run as it is, or read from its folder.

    Raises:
        CheckpointError: as :func:`open_run`.
    """
    return run if isinstance(run, Run) else open_run(run)


def _found_again(config: RunConfig, facts: dict[str, Any]) -> RunConfig:
    """Relative paths mean what they meant in the folder where the run was started.

    Those of nothing that is there (any more) stay, as do names of data sets.
    """
    there = Path(str(facts.get("started_in", Path.cwd())))
    if there == Path.cwd():
        return config

    def found(name: str) -> str:
        return str(there / name) if os.access(there / name, os.R_OK) else name

    model, data = config.model, config.data
    source, _, factory = model.name.rpartition(":")
    named = {
        "name": f"{found(source)}:{factory}" if source.endswith(".py") else model.name,
        "weights": model.weights and found(model.weights),
    }
    kept = {
        "source": data.source if data.source in DATASETS else found(data.source),
        "cache": data.cache and found(data.cache),
    }
    parts = {"model": model.model_copy(update=named), "data": data.model_copy(update=kept)}
    return config.model_copy(update=parts)


def newest_run(root: Path = Path("runs")) -> Run:
    """The run whose student was saved last.

    Raises:
        CheckpointError: if there is none.
    """
    students = _students(root)
    if not students:
        raise CheckpointError(
            f"no run to export under {root.resolve()}: run 'sqakd-deploy train' first, or name a "
            "folder with --run"
        )
    return open_run(students[0].parent)


def own_run(metadata: Mapping[str, str], path: Path, root: Path = Path("runs")) -> Run:
    """The run whose student a file was exported from.

    Args:
        metadata: of the file, JSON by key.
        path: of the file, for messages.
        root: where runs are looked for.

    Raises:
        CheckpointError: if the file does not say whose student it is, or no run there has it.
    """
    wanted = metadata.get(STUDENT_KEY)
    if wanted is None:
        raise CheckpointError(f"{path} does not say whose student it is; name its run with --run")
    found = []
    for student in _students(root):
        with suppress(CheckpointError):  # one that cannot be read hides no other
            if json.dumps(checksum_of(student)) == wanted:
                found.append(open_run(student.parent))
    if found:  # targets that place alike train the same weights
        spec = metadata.get(SPEC_KEY)
        same = [run for run in found if run.config.quantization.model_dump_json() == spec]
        return (same or found)[0]
    raise CheckpointError(
        f"{path} is the student of no run under {root.resolve()}; name its own with --run"
    )


def other_student(metadata: Mapping[str, str], path: Path, run: Run) -> str | None:
    """A line on a file that was exported from another student than a run's.

    Args:
        metadata: of the file, JSON by key.
        path: of the file.
        run: that it is to be compared with.

    Returns:
        The line, with the file's own run where it is under ``runs/`` or beside the other; None if
        it is the run's, or the file does not say.
    """
    wanted, student = metadata.get(STUDENT_KEY), run.path / STUDENT
    if wanted is None or not student.is_file() or json.dumps(checksum_of(student)) == wanted:
        return None
    for root in (Path("runs"), run.path.parent):
        with suppress(CheckpointError):
            own = own_run(metadata, path, root).path
            return f"{path} is of another student than {run.path}'s: of {own}'s"
    return f"{path} is of another student than {run.path}'s: its checksum says so"


def _students(root: Path) -> list[Path]:
    """Saved students, the newest first."""
    files = root.glob(f"*/{STUDENT}")
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def checksum_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def save_weights(model: nn.Module, path: Path) -> None:
    """Save a model's state dict as safetensors, whole or not at all."""
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    try:
        with replacing(path) as temporary:
            save_file(state, temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what :func:`save_weights` wrote into a model of the same kind.

    Raises:
        CheckpointError: if the file is missing, truncated or of another model, or holds numbers
            that are not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, wanted {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} belongs to another model: {'; '.join(problems[:5])}"
            + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        )
    spoilt = non_finite_tensor(state, own)
    if spoilt is not None:
        raise CheckpointError(f"{path}: weights hold values that are not finite: {spoilt}")
    own.update(state)  # it knows its modules' versions, which MNASNet asks for
    model.load_state_dict(own)

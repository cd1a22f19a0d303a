"""Accuracy of every method on a labelled data set, cell by cell: SQAKD's claims, measured.

Each cell of the grid distils a student from one teacher, without labels (``kl``) or as the
supervised baseline (``ce``). The teacher of ``docs/results.md`` is beside this file; without
``--teacher`` one is trained. Finished cells are kept in the json file, an interrupted one goes on
where it was, and several workers may share a folder:

    python benchmarks/accuracy.py --data cifar10-jpeg/ --work work/ --json docs/results.json \\
        --teacher benchmarks/resnet20-cifar10-jpeg.safetensors
    python benchmarks/accuracy.py --list
    python benchmarks/accuracy.py --report docs/results.md --json docs/results.json
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean
from typing import Any

from sqakd_deploy.config import RunConfig, merge
from sqakd_deploy.files import write_text
from sqakd_deploy.listening import Listener
from sqakd_deploy.training.teaching import teach
from sqakd_deploy.training.train import train

MODEL = "resnet20"
# Each round goes on from the weights of the one before, a warm restart of its rate.
TEACHER: tuple[dict[str, Any], ...] = (
    {"epochs": 30, "lr": 0.1, "weight_decay": 5e-4},
    {"epochs": 40, "lr": 0.1, "weight_decay": 5e-4},
)
EPOCHS = 10
# An ablation compares cells with each other, not with a target: the shorter schedule shows it.
ABLATION_EPOCHS = 3
METHODS = ("lsq", "ewgs", "dorefa", "pact")
DEFAULTS = "defaults"  # what an ablation's other cells are compared with
# Ablated where quantization hurts, so that a difference shows; each changes one default.
ABLATED = ("ewgs", 2)
# And of the first method at 4 bits, what is chosen otherwise there.
AT_4_BITS: dict[str, dict[str, Any]] = {
    "lr 1e-3": {"distillation": {"lr": 1e-3}},
    "T = 1": {"distillation": {"temperature": 1.0}},
    "BatchNorm by batches": {"distillation": {"freeze_bn_after": 1.0}},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "δ = 0": {"distillation": {"delta": 0.0}},
    "δ by Hessian": {"distillation": {"delta": "hessian", "delta_every": 2}},
    "T = 1": {"distillation": {"temperature": 1.0}},
    "quantizer lr 1e-5": {"distillation": {"quantizer_lr": 1e-5}},
    "quantizer lr 1e-3": {"distillation": {"quantizer_lr": 1e-3}},
    "lr 3e-3": {"distillation": {"lr": 3e-3}},
    "per channel": {"quantization": {"weights": {"per_channel": True}}},
    "BatchNorm frozen after a third": {"distillation": {"freeze_bn_after": 1 / 3}},
}
# What may keep the two methods of the widest gap at 2 bits from closing it.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "pact": ("quantizer lr 1e-3", {"distillation": {"quantizer_lr": 1e-3}}),
    "dorefa": ("lr 3e-3", {"distillation": {"lr": 3e-3}}),
}


@dataclass(frozen=True)
class Cell:
    """A student to train.

    Attributes:
        method: of weights and activations.
        bits: of weights and activations.
        loss: ``kl`` sees no label.
        placement: ``paper`` or ``target``.
        variant: what differs from the defaults, in words.
        changes: the same as settings.
        epochs: of training; None leaves it to the command line.
    """

    method: str
    bits: int
    loss: str = "kl"
    placement: str = "paper"
    variant: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None

    @property
    def key(self) -> str:
        """Unique name."""
        words = [self.method, f"w{self.bits}a{self.bits}", self.loss, self.placement]
        return " ".join([*words, self.variant]).strip()

    def config(self, data: str, weights: Path, epochs: int) -> RunConfig:
        """The run."""
        side = {"method": self.method, "bits": self.bits}
        settings = {
            "model": {"name": MODEL, "weights": str(weights)},
            "data": {"source": data},
            "quantization": {"weights": side, "activations": side, "placement": self.placement},
            "distillation": {"loss": self.loss, "epochs": epochs},
        }
        return RunConfig.parse(merge(settings, self.changes))


def grid() -> list[Cell]:
    """All cells, the most telling ones first."""
    label_free = [Cell(method, bits) for bits in (2, 4) for method in METHODS]
    one_bit = [Cell(method, 1) for method in ("ewgs", "lsq")]
    deployed = Cell("lsq", 4, placement="target")  # the best of the label-free ones at 4 bits
    supervised = [Cell(c.method, c.bits, "ce") for c in [*label_free, *one_bit]]
    compared = [(*ABLATED, ABLATIONS), (METHODS[0], 4, AT_4_BITS)]
    compared += [(method, 2, dict([change])) for method, change in SHORT.items()]
    ablated = [
        Cell(method, bits, variant=words, changes=changes, epochs=ABLATION_EPOCHS)
        for method, bits, all_changes in compared
        for words, changes in {DEFAULTS: {}, **all_changes}.items()
    ]
    beside = {"distillation": {"feature_weight": 1.0}}
    features = [Cell("ewgs", bits, variant="--features", changes=beside) for bits in (2, 1)]
    return [*label_free, *one_bit, deployed, *features, *supervised, *ablated]


class _Quiet(Listener):
    def message(self, text: str) -> None:
        print(f"  {text}", flush=True)


class Results:
    """The json file: read, and one cell added at a time, also by several workers."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """What is known."""
        if not self.path.exists():
            return {"cells": {}}
        values: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return values

    def add(self, key: str, values: dict[str, Any]) -> None:
        """Keep a finished cell."""
        with locked(self.path.with_suffix(".lock")) as mine:
            assert mine
            known = self.read()
            known["cells"][key] = values
            write_text(self.path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process holds the lock; the system frees it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def teacher(data: str, folder: Path) -> Path:
    """The teacher's weights, trained if there are none yet."""
    weights: Path | None = None
    with locked(folder / "teacher.lock"):
        for number, settings in enumerate(TEACHER):
            path = folder / f"teacher-{number}"
            if not path.exists():
                model = {"name": MODEL, "weights": str(weights) if weights else None}
                start = {"model": model, "data": {"source": data}, "teacher": settings}
                seed = {"distillation": {"seed": number}}
                teach(RunConfig.parse(start | seed), output=path, listener=_Quiet())
            elif json.loads((path / "run.json").read_text())["status"] != "complete":
                teach(resume=path, listener=_Quiet())
            weights = path / "teacher.safetensors"
    assert weights is not None  # there are rounds
    return weights


def _train(config: RunConfig, path: Path) -> dict[str, Any]:
    if path.exists():
        return train(resume=path, listener=_Quiet()).to_dict()
    return train(config, output=path, listener=_Quiet()).to_dict()


def run_cell(cell: Cell, data: str, weights: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """Train one student, or finish the training."""
    start = time.perf_counter()
    path, epochs = folder / cell.key.replace(" ", "-"), cell.epochs or epochs
    state = path / "run.json"
    facts = json.loads(state.read_text()) if state.exists() else {}
    if facts.get("status") == "complete":
        result = facts["results"]
    else:
        result = _train(cell.config(data, weights, epochs), path)
    keys = ("teacher_top1", "student_top1", "agreement", "divergence")
    return {
        "method": cell.method,
        "bits": cell.bits,
        "loss": cell.loss,
        "placement": cell.placement,
        "variant": cell.variant,
        "epochs": epochs,
        **{key: result[key] for key in keys},
        "teacher_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "minutes": round(result["seconds"]["student"] / 60, 1),
        "wall_minutes": round((time.perf_counter() - start) / 60, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }


def work(cells: list[Cell], arguments: argparse.Namespace) -> None:
    """Train the cells that nobody else has, or has begun."""
    results = Results(arguments.json)
    arguments.work.mkdir(parents=True, exist_ok=True)
    weights = arguments.teacher or teacher(arguments.data, arguments.work)
    for cell in cells:
        lock = arguments.work / f"{cell.key.replace(' ', '-')}.lock"
        with locked(lock, wait=False) as mine:
            if not mine or cell.key in results.read()["cells"]:
                continue
            print(cell.key, flush=True)
            values = run_cell(cell, arguments.data, weights, arguments.work, arguments.epochs)
            results.add(cell.key, values)
            print(row(values), flush=True)


HEAD = (
    "| method | bits | loss | placement | student % | off teacher | agreement % | KL | minutes |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(values: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    name = values["method"] + (f", {values['variant']}" if values["variant"] else "")
    bits, gap = values["bits"], values["student_top1"] - values["teacher_top1"]
    return (
        f"| {name} | W{bits}A{bits} | {values['loss']} | {values['placement']} | "
        f"{values['student_top1']:.2f} | {gap:+.2f} | {values['agreement']:.2f} | "
        f"{values['divergence']:.4f} | {values['minutes']} |"
    )


def report(results: dict[str, Any]) -> str:
    """``docs/results.md``: the tables and what they say, without a word that is not computed."""
    cells = [results["cells"][cell.key] for cell in grid() if cell.key in results["cells"]]
    if not cells:
        return "No cell is measured yet.\n"
    first = cells[0]
    if any(cell["teacher_sha256"] != first["teacher_sha256"] for cell in cells):
        raise SystemExit("the cells have different teachers: they belong into different files")
    missing = [cell.key for cell in grid() if cell.key not in results["cells"]]
    lines = [
        "# Accuracy, measured",
        "",
        f"ResNet-20 on CIFAR-10 as JPEG, teacher {first['teacher_top1']:.2f} % "
        f"({' + '.join(str(r['epochs']) for r in TEACHER)} epochs), students "
        f"{first['epochs']} epochs, 10,000 test images, one seed, last epoch "
        "(no state was selected on test data, but when BatchNorm freezes was: decisions.md). "
        "Figures near each other rank nothing: one standard error of an accuracy near 87 % is "
        "0.34 points here.",
        "",
        "The ranges of the grid's students began at those of a sample of the left columns, found "
        "later (decisions.md, *One range search for all methods*): training had that to mend.",
        "",
        "Made by `python benchmarks/accuracy.py --data cifar10-jpeg/ --work work/ --teacher "
        "benchmarks/resnet20-cifar10-jpeg.safetensors --json docs/results.json`, then "
        "`--report docs/results.md`. Minutes are those since a cell's last start, beside other "
        "load and on different CPUs, and compare nothing. Convolutions trained in bfloat16 or in "
        "float32, as `--precision auto` chose on the cell's CPU.",
        "",
        "`kl` sees no label, `ce` is the supervised baseline from the same start. `paper` leaves "
        "residuals in float as the paper does; `target` is what ONNX Runtime runs in integers.",
        "",
        *_table("Label-free", [c for c in cells if c["loss"] == "kl" and not c["variant"]]),
        *_table("Supervised baseline", [c for c in cells if c["loss"] == "ce"]),
        *_versus(cells),
        *_table("Beside the logits", [c for c in cells if _full(c) and c["variant"]]),
        *_ablations([c for c in cells if not _full(c)]),
    ]
    if missing:
        lines += ["## Not measured yet", "", *(f"- {key}" for key in missing), ""]
    return "\n".join(lines)


def _table(title: str, cells: list[dict[str, Any]]) -> list[str]:
    return [f"## {title}", "", HEAD, *map(row, cells), ""] if cells else []


def _full(cell: dict[str, Any]) -> bool:
    return bool(cell["epochs"] != ABLATION_EPOCHS)


def _ablations(cells: list[dict[str, Any]]) -> list[str]:
    table = _table("One setting changed at a time", cells)
    if table:
        table[1:1] = ["", f"{ABLATION_EPOCHS} epochs each, *{DEFAULTS}* too."]
    return table


def _versus(cells: list[dict[str, Any]]) -> list[str]:
    """KL against CE in the means over the methods that have both."""
    plain = [cell for cell in cells if not cell["variant"] and cell["placement"] == "paper"]
    found = {(c["method"], c["bits"], c["loss"]): c["student_top1"] for c in plain}
    lines = []
    for bits in sorted({bits for _, bits, _ in found}, reverse=True):
        both = [m for m in METHODS if {(m, bits, "kl"), (m, bits, "ce")} <= set(found)]
        if both:
            kl, ce = (mean(found[m, bits, loss] for m in both) for loss in ("kl", "ce"))
            lines.append(f"| W{bits}A{bits} | {', '.join(both)} | {kl:.2f} | {ce:.2f} |")
    if not lines:
        return []
    head = "| bits | methods | kl % | ce % |\n|---|---|---|---|"
    return ["## Means over methods", "", head, *lines, ""]


def main() -> None:
    """Run cells, list them, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="data set or folder, as for train")
    parser.add_argument("--teacher", type=Path, help="trained weights  [default: trained first]")
    parser.add_argument("--work", type=Path, default=Path("work"), help="run folders")
    parser.add_argument("--json", type=Path, default=Path("docs/results.json"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only", default="*", help="cells named so, as '*w2a2*'")
    parser.add_argument("--list", action="store_true", help="name the cells, run none")
    parser.add_argument("--report", type=Path, help="write the tables there, run none")
    arguments = parser.parse_args()
    cells = [cell for cell in grid() if fnmatch(cell.key, arguments.only)]
    if not cells:
        parser.error(f"--only: no cell is named like {arguments.only!r}; --list names them")
    known = Results(arguments.json).read()
    if arguments.list:
        for cell in cells:
            print(f"{'done' if cell.key in known['cells'] else 'open'}  {cell.key}")
    elif arguments.report:
        write_text(arguments.report, report(known))
    else:
        work(cells, arguments)


if __name__ == "__main__":
    main()

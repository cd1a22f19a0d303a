"""Every method at several bit-widths on the embedded digits: train, export, compare.

One teacher serves all cells. Prints a Markdown table and writes it as json, too:

    python benchmarks/digits.py --bits 1 2 4 8 --json docs/digits.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from sqakd_deploy.api import export_proven
from sqakd_deploy.checkpoint import open_run
from sqakd_deploy.config import RunConfig
from sqakd_deploy.quantizers import METHODS
from sqakd_deploy.runs import held_out, load_student
from sqakd_deploy.training.train import train


def cell(method: str, bits: int, weights: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """Train and export one student."""
    side = {"method": method, "bits": bits}
    config = RunConfig.parse(
        {
            "model": {"weights": str(weights)},
            "quantization": {"weights": side, "activations": side},
            "distillation": {"epochs": epochs},
        }
    )
    start = time.perf_counter()
    result = train(config, output=folder)
    loaded = load_student(open_run(folder))
    images, split = held_out(loaded)
    path = folder / "model.onnx"
    _, report = export_proven(loaded.student, path, images, labels=split.labels)
    optimised = report.stages[-1]
    integer, total = sum(report.coverage.integer.values()), sum(report.coverage.total.values())
    return {
        "method": method,
        "bits": bits,
        "teacher": result.teacher_top1,
        "student": result.student_top1,
        "agreement": result.agreement,
        "divergence": result.divergence,
        "onnxruntime": optimised.top1,
        "parity": optimised.agreement,
        "error_steps": {stage.name: stage.max_error for stage in report.stages[1:]},
        "integer_layers": f"{integer}/{total}",
        "passed": not report.failures,
        "seconds": round(time.perf_counter() - start, 1),
    }


def row(values: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    errors = ", ".join(f"{error:.2f}" for error in values["error_steps"].values())
    return (
        f"| {values['method']} | {values['bits']} | {values['student']:.2f} | "
        f"{values['agreement']:.2f} | {values['divergence']:.4f} | {values['onnxruntime']:.2f} | "
        f"{errors} | {values['integer_layers']} | {values['seconds']} |"
    )


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        teacher = train(RunConfig.parse({"distillation": {"epochs": 0}}), output=root / "teacher")
        print(f"teacher: {teacher.teacher_top1:.2f} % on {teacher.test_images} images\n")
        print(
            "| method | bits | student % | agreement % | KL | in ORT % | error off, on | integer "
            "| s |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        cells = []
        for method in arguments.methods:
            for bits in arguments.bits:
                weights = root / "teacher" / "teacher.safetensors"
                folder = root / f"{method}-{bits}"
                cells.append(cell(method, bits, weights, folder, arguments.epochs))
                print(row(cells[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What saturation does to answers on this CPU, and what it costs to be exact: ResNet-18 at 224×224.

On x86 CPUs without VNNI, ONNX Runtime's default kernels saturate where weights have 8 bits
(``docs/runtime-rules.md``, rule 19); with the session option ``session.x64quantprecision`` they do
not. Elsewhere the answers are the same, and with AVX512-VNNI alone that option is slower. Answers
are compared with the unoptimised file's, logits in steps of the output; sessions take turns, and a
latency's ratio is the median of the rounds'.

    python benchmarks/saturation.py --images photos/ --json docs/saturation.json
    python benchmarks/saturation.py --json docs/saturation.json --report docs/saturation.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from families import BATCH, photographs, spread
from numpy.typing import NDArray
from pack import session
from torch import Tensor

from sqakd_deploy.api import export
from sqakd_deploy.cpu import describe_cpu, this_cpu
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.evaluate import agreement, predict
from sqakd_deploy.files import write_text
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.models import build_model
from sqakd_deploy.parity import output_step
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.saturation import saturation_of

CLASSES = 1000
# Weight bits, activation bits, first and last layers' bits.
STUDENTS = {"W8A8": (8, 8, 8), "W7A8": (7, 8, 7), "W4A4": (4, 4, 8), "W4A4, ends 7": (4, 4, 7)}
HEAD = (
    "| student | layers at risk | agreement | error: max, mean | exact: agreement | "
    "error: max, mean | ms | exact ms | ratio |"
)


def run(opened: ort.InferenceSession, batches: list[Tensor]) -> NDArray[np.float32]:
    """Logits of all images."""
    return np.concatenate([opened.run(None, {"input": batch.numpy()})[0] for batch in batches])


def latencies(opened: list[ort.InferenceSession], image: Tensor, rounds: int) -> list[float]:
    """Medians (ms) of both, and of their ratios."""
    feed = {"input": image.numpy()}
    runs: list[list[float]] = [[], []]
    for index in range(rounds + 3):
        for which in (0, 1) if index % 2 else (1, 0):
            start = time.perf_counter()
            opened[which].run(None, feed)
            if index >= 3:
                runs[which].append(1e3 * (time.perf_counter() - start))
    ratios = [exact / default for default, exact in zip(*runs, strict=True)]
    return [statistics.median(values) for values in (*runs, ratios)]


def measure(
    bits: tuple[int, int, int], batches: list[Tensor], fit: list[Tensor], rounds: int
) -> dict[str, Any]:
    """A row."""
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=CLASSES).eval()
    reestimate_batch_norm(model, fit)
    spec = QuantSpec(
        weights=TensorSpec(bits=bits[0]),
        activations=TensorSpec(bits=bits[1]),
        first_last_bits=bits[2],
    )
    student = quantize(model, spec, example=fit[0])
    calibrate(student, fit)
    snap_biases(student)
    step, _ = output_step(lower(student), predict(student, fit))
    with tempfile.TemporaryDirectory() as folder:
        path = export(student, Path(folder) / "model.onnx").path
        risk = saturation_of(QdqFile(path))
        wanted = run(session(path, 1, optimize=False), batches)
        opened = [session(path, 1, exact=exact) for exact in (False, True)]
        found = [run(one, batches) for one in opened]
        times = latencies(opened, batches[0][:1], rounds)
    errors = [np.abs(logits - wanted) / step for logits in found]
    return {
        "at_risk": len(risk.at_risk),
        "layers": len(risk.layers),
        "agreement": [agreement(logits, wanted) for logits in found],
        "max": [float(error.max()) for error in errors],
        "mean": [float(error.mean()) for error in errors],
        "ms": times[:2],
        "ratio": times[2],
    }


def row(name: str, values: dict[str, Any]) -> str:
    """A line of the table."""
    sides = (
        f"{values['agreement'][i]:.1f} % | {values['max'][i]:.0f}, {values['mean'][i]:.2f}"
        for i in (0, 1)
    )
    return (
        f"| {name} | {values['at_risk']} of {values['layers']} | {' | '.join(sides)} | "
        f"{values['ms'][0]:.1f} | {values['ms'][1]:.1f} | {values['ratio']:.2f} |"
    )


def report(facts: dict[str, Any]) -> str:
    """``docs/saturation.md``."""
    return "\n".join(
        [
            "# Answers on a CPU without VNNI",
            "",
            "ResNet-18 at 224×224 (weights as initialised, BatchNorm of photographs, calibrated), "
            f"{facts['images']} photographs, on {facts['machine']}, onnxruntime "
            f"{facts['onnxruntime']}, one thread: `python benchmarks/saturation.py --images "
            "photos/ --json docs/saturation.json`, then `--report docs/saturation.md`.",
            "",
            "By default, and *exact*: with `session.x64quantprecision`, as this package's commands "
            "and examples have it there. Agreement and errors (in steps of the output) are against "
            "the same file unoptimised. Untrained networks amplify errors as trained ones do not.",
            "",
            HEAD,
            "|---|" + "---:|" * 8,
            *(row(name, values) for name, values in facts["rows"].items()),
            "",
        ]
    )


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--samples", type=int, default=96, help="photographs compared")
    parser.add_argument("--fit", type=int, default=16, help="photographs that ranges are set on")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=Path("docs/saturation.json"))
    parser.add_argument("--report", type=Path, help="write the page there, measure nothing")
    options = parser.parse_args()
    if options.report:
        write_text(options.report, report(json.loads(options.json.read_text(encoding="utf-8"))))
        return
    if options.images is None:
        parser.error("--images: wanted a folder of photographs")
    torch.set_num_threads(1)
    everything, preprocessing = photographs(options.images)
    fit, batches = (
        list(Batches(spread(everything, count), preprocessing, BATCH, shuffle=False))
        for count in (options.fit, options.samples)
    )
    cpu = describe_cpu()
    facts: dict[str, Any] = {
        "machine": f"{cpu.name}, {', '.join(cpu.integer or ()) or this_cpu()}",
        "onnxruntime": ort.__version__,
        "images": options.samples,
        "rows": {},
    }
    for name, bits in STUDENTS.items():
        facts["rows"][name] = measure(bits, batches, fit, options.rounds)
        print(row(name, facts["rows"][name]), flush=True)
    write_text(options.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

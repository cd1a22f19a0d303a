"""How much larger than its bits a file is, for every family of networks.

A layer's parameters are its weights at their own bits, and biases, scales and whatever stays in
float at 32. What a file has beyond is its graph: operators, names, attributes. Weights are as
torchvision initialises them; BatchNorm's statistics are those of photographs, so that scales and
biases differ between channels as trained ones do.

    python benchmarks/sizes.py --images photos/ --json docs/sizes.json
    python benchmarks/sizes.py --json docs/sizes.json --report docs/sizes.md

Rows that the json file has are kept; remove one to measure it again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from families import BATCH, FAMILIES, photographs, spread
from torch import Tensor, nn

from sqakd_deploy.api import export
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.files import write_text
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.models import build_model
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.sizes import sizes_of

MIB = 2**20
BITS = (4, 2, 1)
CLASSES = 1000  # of ImageNet
HEAD = "| model | bits | file MiB | at its bits | over | a byte a weight | fp32 | fp32 / file |"


def measure(model: nn.Module, bits: int, images: list[Tensor]) -> dict[str, Any]:
    """Sizes (bytes) of a student's files."""
    side = TensorSpec(bits=bits)
    student = quantize(model, QuantSpec(weights=side, activations=side), example=images[0])
    calibrate(student, images)
    snap_biases(student)
    sizes = sizes_of(lower(student))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        packed, plain = (
            export(student, path, options=ExportOptions(pack=pack)).size for pack in (None, False)
        )
    return {
        "packed": packed,
        "plain": plain,
        "information": sizes.information_size,
        "float": sizes.float_size,
    }


def row(model: str, bits: int, values: dict[str, Any]) -> str:
    """A line of the table."""
    packed, plain, information, real = (
        values[key] for key in ("packed", "plain", "information", "float")
    )
    return (
        f"| {model} | {bits} | {packed / MIB:.2f} | {information / MIB:.2f} | "
        f"{100 * (packed / information - 1):+.1f} % | {plain / MIB:.2f} | {real / MIB:.1f} | "
        f"{real / packed:.1f} |"
    )


def report(rows: dict[str, dict[str, Any]]) -> str:
    """``docs/sizes.md``."""
    keys = [f"{name} {bits}" for name in FAMILIES for bits in BITS]
    found = [key for key in keys if key in rows]
    over = {key: rows[key]["packed"] / rows[key]["information"] - 1 for key in found}
    largest = max(over, key=lambda key: over[key])
    return "\n".join(
        [
            "# Files as small as their bits",
            "",
            f"torchvision's networks at 224×224 with {CLASSES} classes, for ONNX Runtime, inner "
            "weights of so many bits, first and last layers of 8: `python benchmarks/sizes.py "
            "--images photos/ --json docs/sizes.json`, then `--report docs/sizes.md`.",
            "",
            "*At its bits*: weights at their own bits; biases, what stays in float and each scale "
            "that differs from a layer's others at 32. *Over*: what the file has beyond, which is "
            "its graph; below 0 where biases that fit into one or two bytes save more. *A byte a "
            "weight*: the same student with `--no-pack`.",
            "",
            f"At most {100 * over[largest]:.1f} % over ({largest.replace(' ', ' at ')} bits).",
            "",
            HEAD,
            "|---|" + "---:|" * 7,
            *(row(*key.split(), rows[key]) for key in found),
            "",
        ]
    )


def main() -> None:
    """Measure what the json file does not have, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--model", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--fit", type=int, default=16, help="photographs that ranges are set on")
    parser.add_argument("--json", type=Path, default=Path("docs/sizes.json"))
    parser.add_argument("--report", type=Path, help="write the page there, measure nothing")
    options = parser.parse_args()
    text = options.json.read_text(encoding="utf-8") if options.json.exists() else "{}"
    rows = json.loads(text)
    if options.report:
        write_text(options.report, report(rows))
        return
    if options.images is None:
        parser.error("--images: wanted a folder of photographs")
    everything, preprocessing = photographs(options.images)
    chosen = spread(everything, options.fit)
    images = list(Batches(chosen, preprocessing, BATCH, shuffle=False))
    for name in options.model:
        keys = {f"{name} {bits}": bits for bits in options.bits}
        if set(keys) <= set(rows):
            continue
        torch.manual_seed(0)
        model = build_model(name, num_classes=CLASSES).eval()
        reestimate_batch_norm(model, images)
        for key, bits in keys.items():
            if key not in rows:
                rows[key] = measure(model, bits, images)
                print(row(name, bits, rows[key]), flush=True)
                write_text(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

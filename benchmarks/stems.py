"""What the fast first layers of files for ONNX Runtime are worth, for every family of networks.

Each student (calibrated, not trained) is written with them and without; both files take turns on
one thread of one process, and must give the same bits. Weights are as torchvision initialises them:
speed does not depend on their values.

    python benchmarks/stems.py --images photos/
    python benchmarks/stems.py --model resnet18 vgg11 --bits 8
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from families import FAMILIES, SIZE, photographs, spread
from sqakd_exporters import onnxruntime as exporter
from torch import Tensor

from sqakd_deploy.api import export
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.models import build_model
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec, TensorSpec

CALIBRATION, WARM, ROUNDS = 8, 5, 60


@contextmanager
def without_fast_stems() -> Iterator[None]:
    """Let the exporter write first layers as the student has them."""
    kept = exporter.with_fast_stems
    exporter.with_fast_stems = lambda graph: graph
    try:
        yield
    finally:
        exporter.with_fast_stems = kept


def sample(folder: str | None) -> Tensor:
    """Photographs, or noise, ``(8, 3, 224, 224)``."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(CALIBRATION, 3, SIZE, SIZE, generator=generator)
    everything, preprocessing = photographs(folder)
    chosen = spread(everything, CALIBRATION)
    return next(iter(Batches(chosen, preprocessing, CALIBRATION, shuffle=False)))


def row(name: str, bits: int, images: Tensor) -> str:
    """A line of the table.

    Raises:
        SystemExit: if the two files differ in any bit.
    """
    torch.manual_seed(0)
    side = TensorSpec(bits=bits)
    spec = QuantSpec(weights=side, activations=side)
    student = quantize(build_model(name, num_classes=1000).eval(), spec, example=images[:1])
    calibrate(student, images)
    runtime, image = get_runtime("onnxruntime"), images[:1].numpy()
    with tempfile.TemporaryDirectory() as folder:
        fast, plain = Path(folder) / "fast.onnx", Path(folder) / "plain.onnx"
        export(student.eval(), fast)
        with without_fast_stems():
            export(student, plain)
        sessions = [runtime.open(path, threads=1) for path in (plain, fast)]
        times: list[list[float]] = [[], []]
        answers = [np.zeros(0)] * 2
        for turn in range(ROUNDS):
            for which in (0, 1) if turn % 2 else (1, 0):
                start = time.perf_counter()
                answers[which] = sessions[which].run(image)
                times[which].append(time.perf_counter() - start)
    if not np.array_equal(*answers):
        raise SystemExit(f"{name}: the two files differ")
    before, after = (1e3 * float(np.median(t[WARM:])) for t in times)
    return f"| {name} | {bits} | {before:.2f} | {after:.2f} | {after / before:.3f} |"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of photographs; noise without it")
    parser.add_argument("--model", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--bits", type=int, default=4)
    options = parser.parse_args()
    images = sample(options.images)
    print(
        "| model | bits | as it is, ms | fast first layer, ms | ratio |\n|---|---:|---:|---:|---:|"
    )
    for name in options.model:
        print(row(name, options.bits, images), flush=True)


if __name__ == "__main__":
    main()

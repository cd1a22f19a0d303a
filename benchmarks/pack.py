"""What packing weights costs and saves: ResNet-18 at 224×224, packed against unpacked.

Both files run in one process, taking turns round by round; latency is the median of the rounds'
ratios. Weights are random: neither size nor speed depends on them.

    python benchmarks/pack.py --bits 8 4 3 2 1 --json pack.json
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
from numpy.typing import NDArray

from sqakd_deploy.api import export
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.models import build_model
from sqakd_deploy.parity import float_size, information_size
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec, TensorSpec

MIB = 2**20
HEADINGS = "| bits | method | packed MiB | unpacked | fp32 | sum of bits | ratio | load ms | unpacked | latency ms | ratio | same |"  # noqa: E501


def session(
    path: Path, threads: int, *, optimize: bool = True, exact: bool = False
) -> ort.InferenceSession:
    """Open a file, at all optimisations or none; ``exact`` sums saturate on no CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(function: Any, *arguments: Any) -> float:
    """Time of one call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def same(paths: list[Path], image: NDArray[np.float32], threads: int) -> bool:
    """Whether two files give the same bits, optimised and not."""
    for optimize in (True, False):
        first, second = (
            session(path, threads, optimize=optimize).run(None, {"input": image})[0]
            for path in paths
        )
        if not np.array_equal(first, second):
            return False
    return True


def measure(paths: list[Path], image: NDArray[np.float32], rounds: int, threads: int) -> Any:
    """Load times (ms) and latencies (ms) of two files, and the latencies' median ratio."""
    loads: list[list[float]] = [[], []]
    for _ in range(max(3, rounds // 8)):
        for path, found in zip(paths, loads, strict=True):
            found.append(seconds(session, path, threads))
    sessions = [session(path, threads) for path in paths]
    runs: list[list[float]] = [[], []]
    for index in range(rounds + 3):
        # Who goes first changes each round: the second of a pair may find a warmer cache.
        for which in (0, 1) if index % 2 else (1, 0):
            taken = seconds(sessions[which].run, None, {"input": image})
            if index >= 3:
                runs[which].append(taken)
    ratios = [packed / plain for packed, plain in zip(*runs, strict=True)]
    load = [1e3 * statistics.median(found) for found in loads]
    return load, [1e3 * statistics.median(found) for found in runs], statistics.median(ratios)


def cell(bits: int, method: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One student, written packed and unpacked."""
    torch.manual_seed(0)
    teacher = build_model(options.model, num_classes=1000, in_channels=3)
    images = torch.randn(4, 3, options.size, options.size)
    side = TensorSpec(method=method, bits=bits)
    spec = QuantSpec(weights=side, activations=side)
    student = quantize(teacher, spec, example=images)
    calibrate(student, images)
    graph = lower(student)
    artifacts = [
        export(student, folder / f"{pack}.onnx", options=ExportOptions(pack=pack))
        for pack in (True, False)
    ]
    paths, image = [artifact.path for artifact in artifacts], images[:1].numpy()
    load, latency, ratio = measure(paths, image, options.rounds, options.threads)
    return {
        "model": options.model,
        "bits": bits,
        "method": method,
        "packed": artifacts[0].size,
        "unpacked": artifacts[1].size,
        "float": float_size(graph),
        "sum_of_bits": information_size(graph),
        "size_ratio": artifacts[0].size / information_size(graph),
        "load_ms": load[0],
        "load_ms_unpacked": load[1],
        "latency_ms": latency[0],
        "latency_ms_unpacked": latency[1],
        "latency_ratio": ratio,
        "same_outputs": same(paths, image, options.threads),
    }


def row(cell: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    sizes = [cell[key] / MIB for key in ("packed", "unpacked", "float", "sum_of_bits")]
    return (
        f"| {cell['bits']} | {cell['method']} | "
        + " | ".join(f"{size:.2f}" for size in sizes)
        + f" | {cell['size_ratio']:.3f} | {cell['load_ms']:.1f} | {cell['load_ms_unpacked']:.1f} | "
        f"{cell['latency_ms']:.2f} | {cell['latency_ratio']:.3f} | "
        f"{'yes' if cell['same_outputs'] else 'NO'} |"
    )


def main() -> None:
    """Run every bit-width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224, help="of the image (pixels)")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2, 1])
    parser.add_argument("--methods", nargs="+", default=["lsq", "ewgs"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        f"{options.model} at {options.size}×{options.size}, onnxruntime {ort.__version__}, ", end=""
    )
    print(f"{options.threads} thread(s), {options.rounds} rounds\n")
    print(HEADINGS)
    print("|" + "---|" * (HEADINGS.count("|") - 1))
    cells = []
    for bits in options.bits:
        for method in options.methods:
            with tempfile.TemporaryDirectory() as folder:
                cells.append(cell(bits, method, Path(folder), options))
            print(row(cells[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

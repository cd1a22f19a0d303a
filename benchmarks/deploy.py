"""Speed and size of exported models beside the other tools', in ONNX Runtime and OpenVINO.

Every file in every runtime has a process of its own, and all of a network's take turns in one run,
so that a busy machine slows all of them; ratios are medians over rounds. Networks are torchvision's
with weights as initialised: neither speed nor size depends on their values.

    pip install -r benchmarks/requirements.txt
    python benchmarks/deploy.py --images photos/ --json docs/deploy.json --markdown docs/deploy.md

``--python`` names the interpreter of another environment for the other tools, where they conflict.
A tool that cannot quantise a network, or a runtime that cannot open its file, has its reason in the
table's place.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import save_file

from sqakd_deploy.api import export
from sqakd_deploy.bench.measure import BenchOptions, take_turns
from sqakd_deploy.bench.process import Candidate, Process, Row
from sqakd_deploy.cpu import describe_cpu
from sqakd_deploy.data import load_data
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.errors import ExportError
from sqakd_deploy.files import write_text
from sqakd_deploy.models import build_model
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec, TensorSpec

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "squeezenet1_0")
RUNTIMES = ("onnxruntime", "openvino")
PEERS = {  # tool: (what the table calls it, suffix, runtimes)
    "float": ("fp32", ".onnx", RUNTIMES),
    "ort": ("ORT quantize_static, 8 bits", ".onnx", RUNTIMES),
    "brevitas-fx": ("Brevitas fx + QCDQ, 8 bits", ".onnx", RUNTIMES),
    "brevitas-layerwise": ("Brevitas layer-wise + QCDQ, 8 bits", ".onnx", RUNTIMES),
    "nncf": ("NNCF, 8 bits", ".xml", ("openvino",)),
}
FP32, ORT, NNCF = "fp32", PEERS["ort"][0], PEERS["nncf"][0]
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W2A2": (2, 2)}  # of weights, activations
OURS = {name: f"sqakd-deploy {name}" for name in BITS}
SIZE, SHORT_SIDE, CALIBRATION = 224, 256, 32  # pixels, pixels, images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's models
MIB = 2**20
HEADINGS = "| tool | threads | ms | p95 | × fp32 | load ms | MiB | in integers |"


@dataclass(frozen=True)
class File:
    """A model as a tool wrote it.

    Attributes:
        tool: what the table calls it.
        runtime: that it is for.
        path: of the file.
    """

    tool: str
    runtime: str
    path: Path


def calibration(folder: str | None) -> NDArray[np.float32]:
    """Images of a folder, or coloured clouds, float32 ``(32, 3, 224, 224)``."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(CALIBRATION, 3, 8, 8, generator=generator)
        clouds = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
        scale = torch.tensor([MEAN, STD])[:, :, None, None]
        return ((clouds - scale[0]) / scale[1]).numpy()
    preprocessing = Preprocessing(
        channels=3, input_size=(SIZE, SIZE), mean=MEAN, std=STD, resize=SHORT_SIDE
    )
    data = load_data(folder, preprocessing=preprocessing)
    from sqakd_deploy.runs import still_batches

    batch = next(iter(still_batches(data.train, data.preprocessing, shuffle_seed=1)))
    return batch[:CALIBRATION].float().contiguous().numpy()


def ours(name: str, state: Any, images: torch.Tensor, folder: Path) -> list[File]:
    """Students of every bit-width for every runtime, calibrated and not trained."""
    files = []
    for bits, tool in OURS.items():
        weights, activations = (TensorSpec(method="lsq", bits=count) for count in BITS[bits])
        for runtime in RUNTIMES:
            model = build_model(name, num_classes=1000, in_channels=3)
            model.load_state_dict(state)
            spec = QuantSpec(weights=weights, activations=activations, target=runtime)
            student = quantize(model.eval(), spec, example=images[:1])
            calibrate(student, images)
            path = folder / f"ours-{bits}-{runtime}.onnx"
            export(student.eval(), path)
            files.append(File(tool, runtime, path))
    return files


def peers(name: str, folder: Path, python: str) -> tuple[list[File], dict[str, str]]:
    """The other tools' files, and why some are not there."""
    files, missing = [], {}
    script = Path(__file__).with_name("deploy_peers.py")
    for tool, (title, suffix, runtimes) in PEERS.items():
        path = folder / f"{tool}{suffix}"
        given = ["--state", folder / "state.safetensors", "--images", folder / "images.npy"]
        done = subprocess.run(
            [python, script, tool, name, *given, "--out", path],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not path.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            missing[title] = lines[-1][:200]
        else:
            files += [File(title, runtime, path) for runtime in runtimes]
    return files, missing


def measure(
    files: list[File], threads: int, how: BenchOptions
) -> tuple[dict[tuple[str, str], Row], dict[str, str]]:
    """Rows by tool and runtime, and the files that a runtime does not open."""
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        started: dict[tuple[str, str], Process] = {}
        for file in files:
            candidate = Candidate(file.tool, file.path, file.runtime, threads)
            try:
                started[file.tool, file.runtime] = stack.enter_context(Process(candidate))
            except ExportError as error:
                missing[f"{file.tool} in {file.runtime}"] = str(error)[:200]
        shape = (how.batch, 3, SIZE, SIZE)
        take_turns(list(started.values()), shape, how)
        return {key: process.row(how.batch) for key, process in started.items()}, missing


def facts(model: str, tool: str, row: Row, fp32: Row | None) -> dict[str, Any]:
    """A row for json."""
    covered = row.coverage
    return {
        "model": model,
        "tool": tool,
        "runtime": row.runtime,
        "threads": row.threads,
        "median_ms": 1e3 * row.median,
        "p95_ms": 1e3 * row.p95,
        "speedup": None if fp32 is None else row.faster_than(fp32),
        "load_ms": 1e3 * row.load,
        "size": row.size,
        "integer": sum(covered.integer.values()),
        "layers": sum(covered.total.values()),
    }


def ratios(model: str, rows: dict[tuple[str, str], Row], threads: int) -> dict[str, Any]:
    """The comparisons that matter, by name; above 1, ours takes longer (or fp32 does)."""
    pairs = {
        "ours W4A4 / ORT's own, in ORT": ((OURS["W4A4"], "onnxruntime"), (ORT, "onnxruntime")),
        "ours W4A4 / NNCF, in OpenVINO": ((OURS["W4A4"], "openvino"), (NNCF, "openvino")),
        "fp32 / ours W4A4, in ORT": ((FP32, "onnxruntime"), (OURS["W4A4"], "onnxruntime")),
        "fp32 / ours W4A4, in OpenVINO": ((FP32, "openvino"), (OURS["W4A4"], "openvino")),
    }
    found: dict[str, Any] = {"model": model, "threads": threads}
    for name, (top, bottom) in pairs.items():
        if top in rows and bottom in rows:
            found[name] = rows[bottom].faster_than(rows[top])
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """The rows of one network and runtime as Markdown."""
    lines = [HEADINGS, "|---" + "|---:" * (HEADINGS.count("|") - 2) + "|"]
    for cell in cells:
        speedup = "—" if cell["speedup"] is None else f"{cell['speedup']:.2f}"
        lines.append(
            f"| {cell['tool']} | {cell['threads']} | {cell['median_ms']:.2f} | "
            f"{cell['p95_ms']:.2f} | {speedup} | {cell['load_ms']:.0f} | "
            f"{cell['size'] / MIB:.2f} | {cell['integer']} of {cell['layers']} |"
        )
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    machine, models = result["machine"], result["models"]
    parts = [
        "# Deployed: speed and size beside other tools",
        f"Written by `{result['command']}`, on {machine}, {result['versions']}. One image of "
        f"3×{SIZE}×{SIZE} a run; all files of a network and a count of threads took turns in one "
        "run. `× fp32`: how many times faster than the float file in the same runtime, median over "
        "rounds. `load`: opening the file in a fresh process. Below 8 bits the file shrinks; the "
        "arithmetic stays int8.",
    ]
    for model in models:
        parts.append(f"## {model}")
        for runtime in RUNTIMES:
            cells = [c for c in result["rows"] if (c["model"], c["runtime"]) == (model, runtime)]
            if cells:
                parts += [f"In {runtime}:", table(cells)]
        parts += [f"- {name}: {why}" for name, why in result["missing"].get(model, {}).items()]
    names = [key for key in result["ratios"][0] if key not in ("model", "threads")]
    parts += ["## Ratios", "| model | threads | " + " | ".join(names) + " |"]
    parts[-1] += "\n|---|---:" + "|---:" * len(names) + "|"
    for found in result["ratios"]:
        values = (f"{found[name]:.3f}" if name in found else "—" for name in names)
        parts[-1] += f"\n| {found['model']} | {found['threads']} | " + " | ".join(values) + " |"
    return "\n\n".join(parts) + "\n"


def run(model: str, images: NDArray[np.float32], options: argparse.Namespace, into: Any) -> None:
    """Make one network's files, and measure them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        # Not build_model: the other tools' environment has torchvision's classes alone.
        state = torchvision.models.get_model(model, weights=None).state_dict()
        save_file(state, folder / "state.safetensors")
        np.save(folder / "images.npy", images)
        files, missing = peers(model, folder, options.python)
        files += ours(model, state, torch.from_numpy(images), folder)
        for threads in options.threads:
            how = BenchOptions((threads,), 1, options.rounds, options.seconds)
            rows, refused = measure(files, threads, how)
            missing |= refused
            for (tool, runtime), row in rows.items():
                into["rows"].append(facts(model, tool, row, rows.get((FP32, runtime))))
            into["ratios"].append(ratios(model, rows, threads))
        into["missing"][model] = missing


def main() -> None:
    """Measure every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--images", help="folder to calibrate on; made-up clouds without")
    parser.add_argument("--python", default=sys.executable, help="has the other tools")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    cpu = describe_cpu()
    import onnxruntime
    import openvino

    asked = f"--model {' '.join(options.model)} " if options.model != list(MODELS) else ""
    result: dict[str, Any] = {
        "command": "python benchmarks/deploy.py "
        f"{asked}--threads {' '.join(map(str, options.threads))} --rounds {options.rounds}",
        "machine": f"{cpu.name}, {cpu.cores} cores, {', '.join(cpu.integer or ['no VNNI'])}",
        "versions": f"onnxruntime {onnxruntime.__version__}, "
        f"openvino {openvino.__version__.split('-')[0]}, torch {torch.__version__}",
        "load_average": os.getloadavg()[0],
        "models": options.model,
        "rows": [],
        "ratios": [],
        "missing": {},
    }
    images = calibration(options.images)
    for model in options.model:
        run(model, images, options, result)
        cells = [cell for cell in result["rows"] if cell["model"] == model]
        print(f"\n{model}\n{table(cells)}", flush=True)
        for name, why in result["missing"][model].items():
            print(f"- {name}: {why}", flush=True)
        for found in result["ratios"][-len(options.threads) :]:
            print(found, flush=True)
        if options.json:
            write_text(options.json, json.dumps(result, indent=1) + "\n")
        if options.markdown:
            write_text(options.markdown, report(result | {"models": list(result["missing"])}))


if __name__ == "__main__":
    main()

"""A training step: float distillation, stock Brevitas and this package, eager and compiled.

All variants take turns in one run, so that a busy machine slows all of them; ratios are taken from
the medians of that run. Each variant runs in a process of its own, for its peak memory. Ours has
frozen BatchNorm statistics, the default at 4 bits; one row has each batch's own, as the float
student and stock Brevitas do.

    python benchmarks/train_step.py --model resnet20 --json train_step.json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from brevitas.graph.quantize import layerwise_quantize
from torch import nn

from sqakd_deploy.models import build_model
from sqakd_deploy.quantization import batch_norms, calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.losses import distillation_loss
from sqakd_deploy.training.optimizers import parameter_groups

SHAPES = {
    "resnet20": (128, 3, 32, 32),
    "resnet18": (16, 3, 224, 224),
    "mobilenet_v2": (16, 3, 224, 224),
}
VARIANTS = {  # name: (student, compiled, bfloat16)
    "float distillation, eager": ("float", False, False),
    "float distillation, compiled": ("float", True, True),
    "stock Brevitas W4A4, eager": ("brevitas", False, False),
    "sqakd-deploy W4A4, eager": ("ours", False, False),
    "sqakd-deploy W4A4, compiled": ("ours", True, True),
    "sqakd-deploy W4A4 paper placement, compiled": ("paper", True, True),
    "sqakd-deploy W4A4 BatchNorm by batches, compiled": ("by batches", True, True),
}
FLOOR, OURS, STOCK = (
    "float distillation, compiled",
    "sqakd-deploy W4A4, compiled",
    "stock Brevitas W4A4, eager",
)


def student_of(kind: str, model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The student to train; stock Brevitas quantises every layer's weights and inputs."""
    if kind == "float":
        return model
    if kind == "brevitas":
        from brevitas.nn import QuantConv2d, QuantLinear
        from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

        options = {
            "weight_quant": Int8WeightPerTensorFloat,
            "weight_bit_width": 4,
            "input_quant": Int8ActPerTensorFloat,
            "input_bit_width": 4,
            "return_quant_tensor": False,
        }
        layers = {nn.Conv2d: (QuantConv2d, options), nn.Linear: (QuantLinear, options)}
        return layerwise_quantize(model, compute_layer_map=layers)
    side = TensorSpec(method="lsq", bits=4)
    placement = "paper" if kind == "paper" else "target"
    spec = QuantSpec(weights=side, activations=side, placement=placement)
    student = quantize(model, spec, example=images)
    calibrate(student, images)
    reestimate_batch_norm(student, images)
    return student


def build_step(model_name: str, variant: str) -> Callable[[], None]:
    """A function that makes one training step, teacher included."""
    kind, compiled, bf16 = VARIANTS[variant]
    torch.manual_seed(0)
    images = torch.randn(SHAPES[model_name])
    teacher = build_model(model_name, num_classes=10).eval().requires_grad_(False)
    student = student_of(kind, build_model(model_name, num_classes=10), images).train()
    if kind in ("ours", "paper"):
        for norm in batch_norms(student):
            norm.eval()
    if bf16:
        images = images.contiguous(memory_format=torch.channels_last)
        teacher.to(memory_format=torch.channels_last)
        student.to(memory_format=torch.channels_last)
    groups = (
        parameter_groups(student, DistillConfig())
        if kind in ("ours", "paper", "by batches")
        else [{"params": list(student.parameters())}]
    )
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)
    run_teacher = torch.compile(teacher) if compiled else teacher
    run_student = torch.compile(student, fullgraph=True) if compiled else student

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                target = run_teacher(images)
            loss = distillation_loss(run_student(images), target, 4.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def worker(model_name: str, variant: str) -> None:
    """Make a step for each line read and answer with its milliseconds and the peak memory."""
    step = build_step(model_name, variant)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    print(json.dumps({"first": first}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        milliseconds = 1e3 * (time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"ms": milliseconds, "peak_mib": peak}), flush=True)


def compare(model_name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Time all variants in turns."""
    command = [sys.executable, __file__, "--model", model_name, "--worker"]
    workers = {}
    first = {}
    for variant in VARIANTS:  # one after the other: compiling takes both cores
        process = subprocess.Popen(
            [*command, variant], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first[variant] = json.loads(process.stdout.readline())["first"]
        workers[variant] = process
    answers: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, process in workers.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            answers[variant].append(json.loads(process.stdout.readline()))
    for process in workers.values():
        process.communicate("")
    return {
        variant: {
            "ms": statistics.median(answer["ms"] for answer in found),
            "first_step_s": first[variant],
            "peak_mib": found[-1]["peak_mib"],
        }
        for variant, found in answers.items()
    }


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.model[0], arguments.worker)
        return
    results = {}
    for model_name in arguments.model:
        found = results[model_name] = compare(model_name, arguments.rounds)
        floor = found[FLOOR]["ms"]
        print(
            f"\n{model_name}, {'×'.join(map(str, SHAPES[model_name]))}, {torch.__version__}, "
            f"{torch.get_num_threads()} threads\n"
        )
        print("| variant | ms per step | × compiled float | first step s | peak MiB |")
        print("|---|---|---|---|---|")
        for variant, values in found.items():
            print(
                f"| {variant} | {values['ms']:.0f} | {values['ms'] / floor:.2f} | "
                f"{values['first_step_s']:.1f} | {values['peak_mib']:.0f} |"
            )
        print(
            f"\nstock Brevitas / ours compiled: {found[STOCK]['ms'] / found[OURS]['ms']:.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

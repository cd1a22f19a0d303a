"""Every family of networks at full size: is the exported file its student, and how is that known?

No published weights are needed. Untrained networks answer every image alike, and amplify a
difference on its way to the logits as no trained one does. So a few hundred steps with labels, on
small images of any labelled folder, teach the float model what an image is; BatchNorm is
re-estimated on photographs, the student is made as ``train --epochs 0`` makes it (calibrated, not
trained), and its last layer is set to the nearest of ten centres, found by k-means on what that
layer reads: then answers differ between images. The student in float64 shows what rounding alone
does, and every layer is compared on the runtime's own codes, where nothing is handed down.

    python benchmarks/families.py --images photos/ --teach cifar10-jpeg/ --json docs/families.json
    python benchmarks/families.py --json docs/families.json --report docs/families.md

Rows that the json file has are kept; remove one to measure it again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from sqakd_deploy.api import export
from sqakd_deploy.config import TeacherConfig
from sqakd_deploy.data import load_data
from sqakd_deploy.data.batches import Batches, LabelledBatches
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.distillation import distill
from sqakd_deploy.evaluate import agreement, predict
from sqakd_deploy.exporting import Runtime, Session
from sqakd_deploy.files import write_text
from sqakd_deploy.integer import lower, snap_biases
from sqakd_deploy.models import build_model
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.quantization import activation_quantizers, quantize, reestimate_batch_norm
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.teacher import train_teacher
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.isolating import isolate
from sqakd_deploy.verification.stages import (
    Expected,
    ParityReport,
    output_step,
    report_of,
    run_stages,
)
from sqakd_deploy.verification.student import in_float64

SIZE, SHORT_SIDE, CLASSES, BATCH = 224, 256, 10, 16  # pixels, pixels, centres, images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True)
class Family:
    """A network, and how it is taught.

    Attributes:
        steps: of teaching, each on 64 small images; 0 for a network that takes one size alone.
        lr: highest rate of these.
        relu: every layer has an integer form.
    """

    steps: int = 250
    lr: float = 0.05
    relu: bool = True


FAMILIES = {
    "squeezenet1_1": Family(lr=0.01),
    "shufflenet_v2_x1_0": Family(),
    "mobilenet_v3_small": Family(relu=False),
    "mobilenet_v2": Family(),
    "mnasnet1_0": Family(500, lr=0.02),
    "regnet_y_400mf": Family(500, lr=0.02),
    "resnet18": Family(),
    "googlenet": Family(),
    "efficientnet_b0": Family(relu=False),
    "resnet50": Family(125),
    "densenet121": Family(125),
    "convnext_tiny": Family(125, lr=0.01, relu=False),
    "vgg11": Family(125, lr=0.01),
    "vit_b_16": Family(0, relu=False),
}
SMALL, TAUGHT_BATCH = 64, 64  # pixels, images


@dataclass(frozen=True)
class OneThread:
    """A runtime that leaves the machine's other cores alone."""

    runtime: Runtime

    @property
    def name(self) -> str:
        """As the runtime's."""
        return self.runtime.name

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        """As the runtime does, on one thread."""
        return self.runtime.open(path, optimize=optimize, threads=threads or 1)


def photographs(folder: str) -> tuple[NDArray[np.uint8], Preprocessing]:
    """All images of a flat folder, and what a network is given of them."""
    preprocessing = Preprocessing(
        channels=3, input_size=(SIZE, SIZE), mean=MEAN, std=STD, resize=SHORT_SIDE
    )
    data = load_data(folder, preprocessing=preprocessing)
    return np.concatenate([data.train.images[:], data.test.images[:]]), preprocessing


def spread(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """So many of the images, evenly spread."""
    return images[np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)]


# -- a student whose answers differ --------------------------------------------------------------


def teach(model: nn.Module, family: Family, folder: str) -> None:
    """A few hundred steps with labels; how well it answers then does not matter here."""
    size, count = (SMALL, SMALL), family.steps * TAUGHT_BATCH
    data = load_data(folder, input_size=size, mean=MEAN, std=STD, limit=count)
    batches = Batches(data.train.images, data.preprocessing, TAUGHT_BATCH, drop_last=True)
    train_teacher(
        model,
        LabelledBatches(batches, data.train.need_labels()),
        TeacherConfig(epochs=1, lr=family.lr),
        acceleration=DistillConfig(compile="off"),
    )


def make_student(
    name: str, bits: int, images: list[Tensor], labelled: str | None
) -> fx.GraphModule:
    """A calibrated student, with a last layer that tells images apart."""
    torch.manual_seed(0)
    family, model = FAMILIES[name], build_model(name, num_classes=CLASSES)
    if labelled is not None and family.steps:
        teach(model, family, labelled)
    model.eval()
    reestimate_batch_norm(model, images)
    side = TensorSpec(bits=bits)
    spec = QuantSpec(weights=side, activations=side)
    student = quantize(model, spec, example=images[0])
    count = sum(map(len, images))
    config = DistillConfig(epochs=0, calibration_images=count, bn_images=count)
    distill(student, images, teacher=model, config=config)
    set_last_layer(student, images)
    return student


@torch.no_grad()
def set_last_layer(student: fx.GraphModule, images: list[Tensor]) -> None:
    """Make logits ``c·f − |c|²/2`` of centres c: the largest is that of the nearest centre."""
    path, behind = last_layer(student)
    layer: Any = student.get_submodule(path)
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    predict(student, images)
    hook.remove()
    features = torch.cat([x.mean([2, 3]) if x.dim() == 4 else x for x in read]).double()
    middle = features.mean(0)
    centred = centres(features) - middle
    bias = -(centred @ middle) - centred.square().sum(1) / 2
    scale = centred.square().mean().sqrt()  # logits of the weights' usual size
    layer.weight.copy_((centred / scale).reshape(layer.weight.shape))
    layer.bias.copy_(bias / scale)
    layer.weight_quant.tensor_quant.initialise(layer.weight)
    quantizers = [q for n, q in activation_quantizers(student).items() if n.split(".")[0] in behind]
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.observing = True
    predict(student, images)
    for quantizer in quantizers:
        quantizer.observing = False
    snap_biases(student)


def last_layer(student: fx.GraphModule) -> tuple[str, set[str]]:
    """The path of the last layer with weights, and those of the modules behind it."""
    calls = [str(node.target) for node in student.graph.nodes if node.op == "call_module"]
    layers = [isinstance(student.get_submodule(c), (nn.Conv2d, nn.Linear)) for c in calls]
    last = len(layers) - 1 - layers[::-1].index(True)
    return calls[last], set(calls[last + 1 :])


def centres(features: Tensor, rounds: int = 20) -> Tensor:
    """K-means of ``(N, D)``, from evenly spread rows (Lloyd, 1982)."""
    found = features[torch.linspace(0, len(features) - 1, CLASSES).long()].clone()
    for _ in range(rounds):
        nearest = torch.cdist(features, found).argmin(1)
        for k in range(CLASSES):
            if (nearest == k).any():
                found[k] = features[nearest == k].mean(0)
    return found


# -- what is measured ----------------------------------------------------------------------------


def measure(
    name: str, bits: int, photos: tuple[NDArray[np.uint8], Preprocessing], options: Any
) -> dict[str, Any]:
    """A row."""
    start = time.perf_counter()
    everything, preprocessing = photos
    count = options.samples

    def batches(number: int) -> list[Tensor]:
        chosen = spread(everything, number)
        return list(Batches(chosen, preprocessing, BATCH, shuffle=False))

    student = make_student(name, bits, batches(min(options.fit, count)), options.teach)
    print(f"  student after {time.perf_counter() - start:.0f} s", flush=True)
    images, graph = batches(count), lower(student)
    logits = predict(student, images)
    expected = Expected("PyTorch student", logits, None, output_step(graph, logits))
    runtime = OneThread(get_runtime("onnxruntime"))
    with tempfile.TemporaryDirectory() as folder:
        path = export(student, Path(folder) / f"{name}.onnx").path
        arrays = [batch.numpy() for batch in images]
        runs = run_stages(path, arrays, expected, runtime)
        report = report_of(path, runs, expected)
        print(f"  answers after {time.perf_counter() - start:.0f} s", flush=True)
        worst = runs.worst_images(expected, options.layer_samples)
        few = np.concatenate(arrays)[worst]
        file = QdqFile(path)
        isolated = {
            state: layer_facts(isolate(student, file, runtime, few, state == "on"))
            for state in ("off", "on")
        }
    print(f"  layers after {time.perf_counter() - start:.0f} s", flush=True)
    step = report.output_step
    return {
        "model": name,
        "bits": bits,
        "relu": FAMILIES[name].relu,
        "images": count,
        "fitted_on": min(options.fit, count),
        "taught": FAMILIES[name].steps if options.teach else 0,
        **answers(logits, step),
        "stages": {s.name.split()[-1]: stage_facts(s) for s in report.stages[1:]},
        "float64": self_difference(student, images, min(options.float64, count), step),
        "isolated": isolated,
        **coverage_facts(report),
        "seconds": round(time.perf_counter() - start),
    }


def answers(logits: NDArray[np.float32], step: float) -> dict[str, Any]:
    """How different a student's answers are, so that agreement is not luck."""
    ordered = np.sort(logits, axis=1)
    margins = (ordered[:, -1] - ordered[:, -2]) / step
    return {
        "distinct": len(np.unique(logits.argmax(1))),
        "std_steps": float(logits.std(0).mean() / step),
        "close": float(np.mean(margins < 1.5)),
    }


def stage_facts(stage: Any) -> dict[str, float]:
    """A way of running the file against the student."""
    return {"agreement": stage.agreement, "max": stage.max_error, "mean": stage.mean_error}


def self_difference(
    student: nn.Module, images: list[Tensor], count: int, step: float
) -> dict[str, float]:
    """The student in float64 against the student."""
    batches = list(torch.cat(images)[:count].split(BATCH))
    here = predict(student, batches)
    exact = predict(in_float64(student), [batch.double() for batch in batches])
    error = np.abs(exact.astype(np.float64) - here) / step
    facts = {"max": float(error.max()), "mean": float(error.mean())}
    return {"images": count, "agreement": agreement(exact, here), **facts}


def layer_facts(report: Any) -> dict[str, Any]:
    """Every layer on the runtime's own codes."""
    worst = report.worst
    return {
        "images": report.images,
        "tensors": len(report.tensors),
        "unseen": list(report.unseen),
        "codes": report.codes,
        "differing": report.differing,
        "largest": report.largest,
        "outside": worst.outside,
        "worst": worst.name,
    }


def coverage_facts(report: ParityReport) -> dict[str, Any]:
    """Layers in integers, and what stays in float, by operator and reason."""
    covered = report.coverage
    floats = Counter((f.op_type, f.reason) for f in covered.fallbacks)
    return {
        "integer": dict(covered.integer),
        "total": dict(covered.total),
        "float": [{"op": op, "count": n, "reason": why} for (op, why), n in floats.items()],
    }


# -- the page ------------------------------------------------------------------------------------

ANSWERS = (
    "| model | bits | steps taught | images (fitted on) | answers | spread | close | "
    "agreement off / on | error off: max, mean | error on: max, mean | float64 agreement | "
    "float64: max, mean |"
)
LAYERS = (
    "| model | bits | images | tensors | codes | differ off | differ on | by at most | "
    "outside off | outside on |"
)
COVERED = "| model | in integers | in float |"


def ruled(head: str) -> list[str]:
    """A table's head and the line under it."""
    return [head, "|---" + "|---:" * (head.count("|") - 2) + "|"]


def answer_row(row: dict[str, Any]) -> str:
    """Logits."""
    off, on, exact = row["stages"]["off"], row["stages"]["on"], row["float64"]
    return (
        f"| {row['model']} | {row['bits']} | {row['taught']} | "
        f"{row['images']} ({row['fitted_on']}) | {row['distinct']} of {CLASSES} | "
        f"{row['std_steps']:.1f} | {100 * row['close']:.1f} % | "
        f"{off['agreement']:.1f} / {on['agreement']:.1f} | "
        f"{off['max']:.1f}, {off['mean']:.2f} | {on['max']:.1f}, {on['mean']:.2f} | "
        f"{exact['agreement']:.1f} | {exact['max']:.1f}, {exact['mean']:.2f} |"
    )


def layer_row(row: dict[str, Any]) -> str:
    """Codes."""
    off, on = row["isolated"]["off"], row["isolated"]["on"]
    unseen = len(set(off["unseen"]) | set(on["unseen"]))
    tensors = f"{off['tensors']}" + (f" ({unseen} unseen)" if unseen else "")
    shares = (f"{1e6 * s['differing'] / s['codes']:.1f}" for s in (off, on))
    return (
        f"| {row['model']} | {row['bits']} | {off['images']} | {tensors} | "
        f"{off['codes'] / 1e6:.1f} M | "
        + " | ".join(shares)
        + f" | {max(off['largest'], on['largest'])} | {off['outside']:.1e} | {on['outside']:.1e} |"
    )


def covered_row(row: dict[str, Any]) -> str:
    """Operators."""
    counts = ", ".join(
        f"{row['integer'].get(op, 0)} of {total} {op}" for op, total in sorted(row["total"].items())
    )
    left = sum(item["count"] for item in row["float"])
    return f"| {row['model']} W{row['bits']}A{row['bits']} | {counts} | {left or '–'} |"


def float_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What stays in float, and why."""
    return [
        f"- {row['model']}: {item['count']} {item['op']}: {item['reason']}"
        for row in rows
        for item in row["float"]
    ]


def report(result: dict[str, Any]) -> str:
    """The page."""
    order = list(FAMILIES)
    rows = sorted(result["rows"].values(), key=lambda r: (-r["bits"], order.index(r["model"])))
    narrow = [row for row in rows if row["bits"] == min(r["bits"] for r in rows)]
    lines = [
        "# Every family at full size",
        "",
        f"{len({row['model'] for row in rows})} of torchvision's families at 3×{SIZE}×{SIZE} on "
        f"ImageNet photographs, placed for ONNX Runtime ({result['versions']}, one thread): "
        "`python benchmarks/families.py --images photos/ --teach cifar10-jpeg/ --fit 64 "
        "--json docs/families.json`, then "
        "`--report docs/families.md`.",
        "",
        TEXT_STUDENTS,
        "",
        "## Answers",
        "",
        TEXT_ANSWERS,
        "",
        *ruled(ANSWERS),
        *map(answer_row, rows),
        "",
        "## Every layer on the runtime's own codes",
        "",
        TEXT_LAYERS,
        "",
        *ruled(LAYERS),
        *map(layer_row, rows),
        "",
        "## What runs in integers",
        "",
        "How large the files are: [sizes.md](sizes.md).",
        "",
        *ruled(COVERED),
        *map(covered_row, narrow),
        "",
        "In float, with the reason that `export` prints (rules are those of "
        "[runtime-rules.md](runtime-rules.md)):",
        "",
        *float_lines(narrow),
    ]
    return "\n".join(lines) + "\n"


TEXT_STUDENTS = f"""\
Weights are as torchvision initialises them (seed 0) and taught for so many steps of {TAUGHT_BATCH}
images of {SMALL}×{SMALL} pixels with labels, since untrained layers amplify a difference on its way
to the logits. BatchNorm's statistics are re-estimated on photographs, students calibrated as
`train --epochs 0` does, and the last layer finds the nearest of {CLASSES} centres of a k-means on
what it reads, so that answers differ from image to image. Nothing here says how accurate a family
is."""

TEXT_ANSWERS = """\
Errors are those of logits in steps of the 8-bit output. *Answers*: how many different ones the
student gives; *spread*: standard deviation of a logit between images, in steps; *close*: share of
images whose two largest logits are at most a step apart, so that one code decides. *off* and *on*
are ONNX Runtime's optimisations, against the student in PyTorch. *float64* is PyTorch against
itself: the same student with float64 sums (on fewer images), so what float32's rounding alone does
to its answers: no file can be expected to be nearer to its student than the student is to itself.
Agreement below 99 % stands where that one is low as well (a network that was not taught), or where
many images are close; the next table shows that it begins in no layer."""

TEXT_LAYERS = """\
The student is run layer by layer on the codes that ONNX Runtime computed, so nothing is handed
down. *differ*: codes in a million that are not the student's; *by at most*: steps; *outside*: how
far the student's value before rounding lies outside the interval of the runtime's code, at most, in
steps. Where that is next to nothing, each code that differs stems from a value on the border of two
codes, which another order of float32 sums put on the other side. A wrong kernel, constant or
operator would move values that lie far from any border."""


def main() -> None:
    """Measure what the json file does not have, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--teach", help="folder of labelled images, to teach networks on")
    parser.add_argument("--model", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--samples", type=int, default=500, help="images compared, at most")
    parser.add_argument("--fit", type=int, default=32, help="images that ranges are set on")
    parser.add_argument("--float64", type=int, default=64, help="images in float64, at most")
    parser.add_argument("--layer-samples", type=int, default=2, help="images for single layers")
    parser.add_argument("--json", type=Path, default=Path("docs/families.json"))
    parser.add_argument("--report", type=Path, help="write the page there, measure nothing")
    options = parser.parse_args()
    known = {"rows": {}}
    if options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))
    if options.report:
        write_text(options.report, report(known))
        return
    if options.images is None:
        parser.error("--images: wanted a folder of photographs")
    torch.set_num_threads(1)
    import onnxruntime

    libraries = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    known["versions"] = ", ".join(f"{n} {v.split('+')[0]}" for n, v in libraries.items())
    photos = photographs(options.images)
    for bits in options.bits:
        for name in options.model:
            key = f"{name} {bits}"
            if key not in known["rows"]:
                print(key, flush=True)
                known["rows"][key] = row = measure(name, bits, photos, options)
                print(f"{answer_row(row)}\n{layer_row(row)}", flush=True)
                write_text(options.json, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()

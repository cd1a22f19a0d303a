"""Every family of networks at full size: is the exported file its student, and how is that known?

No published weights are needed. Untrained networks answer every image alike, and amplify a
difference on its way to the logits as no trained one does. So a few hundred steps with labels, on
small images of any labelled folder, teach the float model what an image is; BatchNorm is
re-estimated on photographs, the student is made as ``train --epochs 0`` makes it (calibrated, not
trained), and its last layer is set to the nearest of ten centres, found by k-means in the whitened
principal directions of what that layer reads: then answers differ between images, by more than
one direction that outweighs all others. The student in float64 shows what rounding alone
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
from families_page import CLASSES, SIZE, SMALL, TAUGHT_BATCH, answer_row, layer_row, page
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torchvision.models.vision_transformer import interpolate_embeddings

from sqakd_deploy.api import export
from sqakd_deploy.config import TeacherConfig
from sqakd_deploy.data import load_data
from sqakd_deploy.data.batches import Batches, LabelledBatches
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.evaluate import agreement, predict
from sqakd_deploy.exporting import Runtime, Session
from sqakd_deploy.files import write_text
from sqakd_deploy.lowering.borders import settle
from sqakd_deploy.lowering.exact import in_integers
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.models import build_model
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.quantization import activation_quantizers, quantize, reestimate_batch_norm
from sqakd_deploy.spec import DistillConfig, QuantSpec, TensorSpec
from sqakd_deploy.training.distillation import distill
from sqakd_deploy.training.teacher import train_teacher
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.isolating import isolate
from sqakd_deploy.verification.running import Expected, run_stages
from sqakd_deploy.verification.stages import ParityReport, output_step, report_of

SHORT_SIDE, BATCH = 256, 16  # pixels, images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True)
class Family:
    """A network, and how it is taught.

    Attributes:
        steps: of teaching, each on 64 small images.
        lr: highest rate of these.
        relu: every layer has an integer form.
        patch: side of a token's patch, in pixels, where positions are learned: such a network takes
            one size alone, is taught as one of the small size, and its positions interpolated.
    """

    steps: int = 250
    lr: float = 0.05
    relu: bool = True
    patch: int | None = None


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
    "vit_b_16": Family(125, lr=0.01, relu=False, patch=16),
}


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


def taught(name: str, folder: str) -> nn.Module:
    """A network that has seen labelled images; how well it answers then does not matter here."""
    family = FAMILIES[name]
    if family.patch is None:
        model = build_model(name, num_classes=CLASSES)
        teach(model, family, folder)
        return model
    small = build_model(name, num_classes=CLASSES, args={"image_size": SMALL})
    teach(small, family, folder)
    model = build_model(name, num_classes=CLASSES)
    model.load_state_dict(interpolate_embeddings(SIZE, family.patch, small.state_dict()))
    return model


def teach(model: nn.Module, family: Family, folder: str) -> None:
    """A few hundred steps with labels."""
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
    model = taught(name, labelled) if labelled else build_model(name, num_classes=CLASSES)
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
    """Make logits ``c·w − |c|²/2`` of whitened features w: the largest is the nearest centre's."""
    path, behind = last_layer(student)
    layer: Any = student.get_submodule(path)
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    predict(student, images)
    hook.remove()
    features = torch.cat([x.mean([2, 3]) if x.dim() == 4 else x for x in read]).double()
    middle = features.mean(0)
    white = whitening(features - middle)
    found = centres((features - middle) @ white)
    weight = found @ white.T
    bias = -(weight @ middle) - found.square().sum(1) / 2
    scale = weight.square().mean().sqrt()  # logits of the weights' usual size
    layer.weight.copy_((weight / scale).reshape(layer.weight.shape))
    layer.bias.copy_(bias / scale)
    layer.weight_quant.tensor_quant.initialise(layer.weight)
    quantizers = [q for n, q in activation_quantizers(student).items() if n.split(".")[0] in behind]
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.observing = True
    predict(student, images)
    for quantizer in quantizers:
        quantizer.observing = False
    settle(student)


def last_layer(student: fx.GraphModule) -> tuple[str, set[str]]:
    """The path of the last layer with weights, and those of the modules behind it."""
    calls = [str(node.target) for node in student.graph.nodes if node.op == "call_module"]
    layers = [isinstance(student.get_submodule(c), (nn.Conv2d, nn.Linear)) for c in calls]
    last = len(layers) - 1 - layers[::-1].index(True)
    return calls[last], set(calls[last + 1 :])


def whitening(centred: Tensor) -> Tensor:
    """The main directions of ``(N, D)``, each scaled to variance 1, as ``(D, CLASSES − 1)``."""
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = slice(CLASSES - 1)
    return directions[kept].T / sizes[kept] * len(centred) ** 0.5


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
    logits = predict(in_integers(student), images)
    expected = Expected("student", logits, None, output_step(graph, logits))
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
        "whitened": True,
        **answers(logits, step),
        "stages": {s.name.split()[-1]: stage_facts(s) for s in report.stages[1:]},
        "simulated": difference(predict(student, images), logits, step),
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


def difference(
    simulated: NDArray[np.float32], logits: NDArray[np.float32], step: float
) -> dict[str, float]:
    """The student as it was trained, in float32, against its integers."""
    error = np.abs(simulated.astype(np.float64) - logits) / step
    facts = {"max": float(error.max()), "mean": float(error.mean())}
    return {"agreement": agreement(simulated, logits), **facts}


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


def main() -> None:
    """Measure what the json file does not have, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--teach", help="folder of labelled images, to teach networks on")
    parser.add_argument("--model", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--samples", type=int, default=500, help="images compared, at most")
    parser.add_argument("--fit", type=int, default=32, help="images that ranges are set on")
    parser.add_argument("--layer-samples", type=int, default=2, help="images for single layers")
    parser.add_argument("--json", type=Path, default=Path("docs/families.json"))
    parser.add_argument("--report", type=Path, help="write the page there, measure nothing")
    options = parser.parse_args()
    known = {"rows": {}}
    if options.json.exists():
        known = json.loads(options.json.read_text(encoding="utf-8"))
    if options.report:
        write_text(options.report, page(known, list(FAMILIES)))
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

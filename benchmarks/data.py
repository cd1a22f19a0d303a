"""Whether data keep up with training: from memory, from the cache, and decoded by workers.

For each source, in one run: images a second of the batches alone, augmentation included, and what
an epoch takes in multiples of its steps. A step is distillation of a float network by its like,
eager, the fastest that a step can be without compiling; a compiled one is given by its time.

    python benchmarks/data.py --json data.json
    python benchmarks/data.py --case photos --folder path/to/imagenet --step-ms 150
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sqakd_deploy.data import ImageData, load_data
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.data.options import Keeping, default_workers
from sqakd_deploy.data.preprocessing import named_augmentation
from sqakd_deploy.models import build_model
from sqakd_deploy.training.losses import distillation_loss


@dataclass(frozen=True)
class Case:
    """What to train on what.

    Attributes:
        model: the network.
        batch: images a step.
        side: of generated images (pixels).
        input_size: what the network is given; None takes the images as they are.
        augmentation: by name.
        images: to generate.
    """

    model: str
    batch: int
    side: int
    input_size: tuple[int, int] | None
    augmentation: str
    images: int


CASES = {
    "cifar": Case("resnet20", 128, 32, None, "cifar", 12_000),
    "photos": Case("resnet18", 16, 256, (224, 224), "imagenet", 1_000),
}
SOURCES = ("memory", "cache", "workers")


def generate(folder: Path, case: Case) -> None:
    """JPEGs as large as photographs of that size; plain noise would take longer to decode."""
    rng = np.random.default_rng(0)
    for index in range(case.images):
        coarse = rng.integers(0, 256, (case.side // 4, case.side // 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((case.side, case.side), Image.Resampling.BICUBIC)
        home = folder / f"class{index % 10}"
        home.mkdir(exist_ok=True)
        image.save(home / f"{index:06d}.jpg", quality=90)


def read(folder: Path, case: Case, source: str, cache: Path) -> tuple[ImageData, float]:
    """The data from one kind of source, and the seconds until they were ready."""
    keeping = {
        "memory": Keeping(cache=False),
        "cache": Keeping(cache=cache),
        "workers": Keeping(cache=cache, max_cache_gb=0),
    }[source]
    start = time.perf_counter()
    data = load_data(folder, input_size=case.input_size, keeping=keeping)
    return data, time.perf_counter() - start


def batches_of(data: ImageData, case: Case, device: torch.device) -> Batches:
    """As training makes them."""
    augmentation = named_augmentation(case.augmentation, data.preprocessing.input_size)
    return Batches(
        data.train.images,
        data.preprocessing,
        case.batch,
        augmentation=augmentation,
        drop_last=True,
        device=device,
    )


def build_step(case: Case, device: torch.device, wait_ms: float | None) -> Callable[..., None]:
    """A training step, or one that only takes its time."""
    if wait_ms is not None:
        return lambda images: time.sleep(wait_ms / 1e3)
    teacher, student = (build_model(case.model, num_classes=10).to(device) for _ in range(2))
    teacher.eval()
    optimizer = torch.optim.Adam(student.parameters(), fused=True)

    def step(images: torch.Tensor) -> None:
        with torch.no_grad():
            target = teacher(images)
        loss = distillation_loss(student(images), target, 4.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def seconds(items: Iterator[Any], work: Callable[[Any], None], device: torch.device) -> float:
    """Time to take all items and work on each."""
    start = time.perf_counter()
    for item in items:
        work(item)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sources in turns; medians over the rounds."""
    case, device = CASES[name], torch.device(arguments.device)
    step = build_step(case, device, arguments.step_ms)
    loaders, found = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        read(folder, case, "cache", Path(cache))  # so that the figure is of a second start
        for source in SOURCES:
            data, ready = read(folder, case, source, Path(cache))
            loaders[source] = batches_of(data, case, device)
            found[source] = {"ready_s": ready, "alone": [], "ratio": []}
        for _ in range(arguments.rounds + 1):  # the first warms up
            for source, loader in loaders.items():
                count = min(len(loader), arguments.steps)
                first = next(iter(loader))
                alone = seconds(_some(loader, count), lambda images: None, device)
                steps = seconds(iter([first] * count), step, device)
                epoch = seconds(_some(loader, count), step, device)
                found[source]["alone"].append(count * case.batch / alone)
                found[source]["ratio"].append(epoch / steps)
                found[source]["step_ms"] = 1e3 * steps / count
    return {
        source: {
            "ready_s": values["ready_s"],
            "images_per_s": statistics.median(values["alone"][1:]),
            "step_ms": values["step_ms"],
            "epoch_over_steps": statistics.median(values["ratio"][1:]),
        }
        for source, values in found.items()
    }


def _some(loader: Batches, count: int) -> Iterator[torch.Tensor]:
    return loader.starting_at(len(loader) - count)


def main() -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--folder", type=Path, help="Images to use in place of generated ones.")
    parser.add_argument("--step-ms", type=float, help="Wait so long instead of training.")
    parser.add_argument("--steps", type=int, default=10, help="At most, in an epoch.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.case:
        with tempfile.TemporaryDirectory() as made:
            if arguments.folder is None:
                generate(Path(made), CASES[name])
            results[name] = measure(name, arguments.folder or Path(made), arguments)
        print(f"\n{name}: {CASES[name]}, {default_workers()} workers, {arguments.device}\n")
        print("| source | ready after s | images/s alone | step ms | epoch / steps |")
        print("|---|---|---|---|---|")
        for source, values in results[name].items():
            print(
                f"| {source} | {values['ready_s']:.2f} | {values['images_per_s']:.0f} | "
                f"{values['step_ms']:.1f} | {values['epoch_over_steps']:.3f} |"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

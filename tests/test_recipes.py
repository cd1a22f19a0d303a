"""Recipes: one for each row of the paper's tables, as published, and each of them starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sqakd_deploy.config import RunConfig, load_config
from sqakd_deploy.models import build_model
from sqakd_deploy.quantization import activation_quantizers, quantize, weight_quantizers
from sqakd_deploy.training.train import train

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))

# (data set, network, method): bits
TABLES: dict[tuple[str, str, str], set[int]] = {
    ("cifar10", "resnet20", "ewgs"): {1, 2, 4},
    ("cifar10", "vgg8", "ewgs"): {2},
    ("cifar100", "resnet32", "ewgs"): {1, 2, 4},
    ("cifar100", "vgg13", "ewgs"): {1, 2, 4},
    ("tiny-imagenet", "resnet18", "pact"): {3, 4, 8},
    ("tiny-imagenet", "resnet18", "lsq"): {3, 4, 8},
    ("tiny-imagenet", "resnet18", "dorefa"): {3, 4, 8},
    ("tiny-imagenet", "vgg11_tiny", "pact"): {3, 4, 8},
    ("tiny-imagenet", "vgg11_tiny", "lsq"): {3, 4, 8},
    ("tiny-imagenet", "vgg11_tiny", "dorefa"): {3, 4, 8},
    ("tiny-imagenet", "mobilenet_v2", "pact"): {3, 4},
    ("tiny-imagenet", "mobilenet_v2", "dorefa"): {8},
    ("tiny-imagenet", "shufflenet_v2_x0_5", "pact"): {4},
    ("tiny-imagenet", "shufflenet_v2_x0_5", "dorefa"): {8},
    ("tiny-imagenet", "squeezenet1_0", "lsq"): {4},
    ("tiny-imagenet", "squeezenet1_0", "dorefa"): {8},
}

# network: epochs, batch size, lr, quantizer_lr, weight_decay
CIFAR = {
    "resnet20": (1200, 256, 1e-3, 1e-5, 1e-4),
    "vgg8": (400, 256, 1e-3, 1e-5, 1e-4),
    "resnet32": (720, 64, 5e-4, 5e-6, 5e-4),
    "vgg13": (720, 64, 5e-4, 5e-6, 5e-4),
}

# (network, bits): the weight α of the KL term where it is not 1
ALPHA = {
    ("resnet32", 4): 100,
    ("vgg11_tiny", 3): 10,
    ("vgg11_tiny", 4): 100,
    ("vgg11_tiny", 8): 100,
    ("mobilenet_v2", 3): 10,
    ("mobilenet_v2", 4): 100,
    ("mobilenet_v2", 8): 100,
    ("shufflenet_v2_x0_5", 4): 100,
    ("shufflenet_v2_x0_5", 8): 800,
    ("squeezenet1_0", 4): 50,
    ("squeezenet1_0", 8): 50,
}

ONE_A_NETWORK = list({load_config(FOLDER / n, {}).model.name: n for n in RECIPES}.values())

SHORTENED: dict[str, Any] = {
    "teacher": {"epochs": 1, "batch_size": 2},
    "distillation": {
        "epochs": 1,
        "batch_size": 2,
        "warmup_steps": 0,
        "calibration_images": 4,
        "bn_images": 4,
        "compile": "off",
    },
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def _coarse_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 candidates for VGG-13's 9 million weights take seconds, and no run here needs the best."""
    monkeypatch.setattr("sqakd_deploy.quantizers.ranges._CANDIDATES", 4)


def read(name: str) -> RunConfig:
    return load_config(FOLDER / name, {})


def bits_of(config: RunConfig) -> int:
    assert config.quantization.weights.bits == config.quantization.activations.bits
    return config.quantization.weights.bits


def test_every_row_of_the_tables_has_one_recipe() -> None:
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in RECIPES:
        config = read(name)
        method = config.quantization.weights.method
        assert config.quantization.activations.method == method
        row = (config.data.source, config.model.name, method)
        found.setdefault(row, set()).add(bits_of(config))
    assert found == TABLES
    assert len(RECIPES) == sum(len(widths) for widths in TABLES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_objective_is_the_paper_s(name: str) -> None:
    config = read(name)
    training = config.distillation
    assert (training.loss, training.temperature) == ("kl", 4.0)
    assert training.freeze_bn_after == 1  # as published; not the default
    assert training.kl_weight == ALPHA.get((config.model.name, bits_of(config)), 1)
    assert config.quantization.placement == "paper"
    assert name == f"{name.split('-w')[0]}-{config.quantization.label}-{name.rpartition('-')[2]}"
    assert name.startswith(config.data.source)
    assert name.endswith(f"-{config.quantization.weights.method}.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_the_schedule_is_the_published_one(name: str) -> None:
    config = read(name)
    model, run = config.model.name, config.distillation
    given = (run.epochs, run.batch_size, run.lr, run.quantizer_lr, run.weight_decay)
    if model in CIFAR:
        assert given == CIFAR[model]
        assert (run.optimizer, run.warmup_steps, run.quantizer_weight_decay) == ("adam", 0, 0)
        return
    lr, decay = (4e-3, 1e-4) if bits_of(config) == 3 else (5e-4, 5e-4)
    assert given == (100, 32 if model == "vgg11_tiny" else 64, lr, lr, decay)
    assert (run.optimizer, run.momentum, run.nesterov) == ("sgd", 0.9, True)
    assert (run.warmup_steps, run.quantizer_weight_decay) == (2500, decay)
    assert config.data.input_size == (224, 224)


QUANTISED = {"resnet20": 18, "resnet32": 30, "vgg8": 4, "vgg13": 8}
"""Convolutions that the paper quantises: not the stem, nor what else of VGG's first stage."""


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("cifar")])
def test_the_layers_are_the_paper_s(name: str) -> None:
    config = read(name)
    model = build_model(config.model.name, num_classes=10)
    student = quantize(model, config.quantization, example=(3, 32, 32))
    assert len(weight_quantizers(student)) == QUANTISED[config.model.name]
    assert len(activation_quantizers(student)) == QUANTISED[config.model.name]


@pytest.mark.parametrize("name", RECIPES)
def test_departures_are_named(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.startswith("# SQAKD, Table ")
    assert "\n# Departures:\n# - " in text


def test_the_table_lists_every_recipe_as_it_is() -> None:
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| [456] \|", line)]
    assert len(rows) == len(RECIPES)
    for table, link, network, method, bits, *figures in rows:
        name = re.fullmatch(r"\[(.*)\]\(\1\.yaml\)", link)
        assert name is not None
        config = read(f"{name[1]}.yaml")
        head, second, *_ = (FOLDER / f"{name[1]}.yaml").read_text(encoding="utf-8").splitlines()
        assert head.startswith(f"# SQAKD, Table {table}: {network} on ")
        assert head.endswith(f", {method}, {bits}.")
        assert bits.lower() == config.quantization.label
        assert method.lower() == config.quantization.weights.method
        published = re.findall(r"\d+\.\d+", second) or ["–", "–", "–"]
        assert figures == published


def images(folder: Path, size: int) -> Path:
    """A tree of two classes, four images to train on and two to test."""
    random = np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 1)):
        for name in ("first", "second"):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def start(name: str, folder: Path) -> None:
    """An epoch of a few images; at 32×32, since no layer has a shape of its own at 224×224."""
    data = {"source": str(images(folder / "data", 32)), "input_size": [32, 32]}
    settings = {**SHORTENED, "data": data}
    config = load_config(FOLDER / name, settings)
    result = train(config, output=folder / "run")
    metrics = (result.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(metrics) == 2  # an epoch of the teacher, an epoch of the student
    assert (result.run / "student.safetensors").exists()


@pytest.mark.parametrize("name", ONE_A_NETWORK)
def test_recipes_start(name: str, tmp_path: Path) -> None:
    start(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ONE_A_NETWORK])
def test_all_other_recipes_start(name: str, tmp_path: Path) -> None:
    start(name, tmp_path)

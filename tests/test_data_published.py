"""The preprocessing of torchvision's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sqakd_deploy.data import Preprocessing, load_data
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.data.published import published_classes, published_preprocessing

RESNET18 = Preprocessing(
    channels=3,
    input_size=(224, 224),
    resize=256,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
@pytest.mark.parametrize("model", ["resnet18", "torchvision:resnet18"])
def test_torchvisions_own(model: str, weights: str) -> None:
    assert published_preprocessing(model, weights) == RESNET18


def test_each_torchvision_classifier_has_one() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        found = published_preprocessing(name, "DEFAULT")
        assert found is not None, name
        assert found.resize is not None
        assert found.resize >= found.input_size[0]


def test_weights_of_features_alone_name_no_classes() -> None:
    assert published_classes("vgg16", "IMAGENET1K_FEATURES") is None
    classes = published_classes("vgg16", "DEFAULT")
    assert classes is not None
    assert classes[0] == "tench"


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet18", None),
        ("resnet18", "weights/resnet18.pth"),
        ("resnet20", "DEFAULT"),
        ("file.py:build", "DEFAULT"),
    ],
)
def test_nothing_is_known_of_others(model: str, weights: str | None) -> None:
    assert published_preprocessing(model, weights) is None


def test_batches_are_as_torchvision_would_make_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        smooth = Image.fromarray(image).resize((320, 320), Image.Resampling.BICUBIC)
        smooth.save(tmp_path / f"{index}.png")
    data = load_data(tmp_path, preprocessing=published_preprocessing("resnet18", "DEFAULT"))

    (batch,) = Batches(data.train.images, data.preprocessing, 1, shuffle=False)

    with Image.open(tmp_path / "0.png") as image:
        wanted = torchvision.models.ResNet18_Weights.DEFAULT.transforms()(image)
    level = 1 / 255 / 0.224  # both resize with Pillow's filter; one rounds elsewhere
    torch.testing.assert_close(batch[0], wanted, atol=level * 1.01, rtol=0)


def test_a_persons_wish_wins_over_the_models() -> None:
    data = load_data("digits", preprocessing=RESNET18, mean=(0.5,), input_size=(112, 112), limit=4)
    assert data.preprocessing.mean == (0.5,) * 3
    assert data.preprocessing.std == RESNET18.std
    assert (data.preprocessing.input_size, data.preprocessing.resize) == ((112, 112), 128)
    (batch,) = Batches(data.train.images, data.preprocessing, 4, shuffle=False)
    assert batch.shape == (4, 3, 112, 112)

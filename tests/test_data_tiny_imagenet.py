"""Tiny-ImageNet's and ImageNet's own layouts, on generated trees."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sqakd_deploy.data import Augmentation, load_data
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.data.layout import find_splits
from sqakd_deploy.data.preprocessing import named_augmentation
from sqakd_deploy.errors import DataError

NUMBERS = ("n02124075", "n01443537", "n01629819")  # in the order of wnids.txt, not sorted
WORDS = """n00001740\tentity
n01443537\tgoldfish, Carassius auratus
n01629819\tEuropean fire salamander, Salamandra salamandra
n02124075\tEgyptian cat
"""


def _image(path: Path, value: int, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tree with three classes, as unpacked; the value of an image says which it is."""
    root = tmp_path / "tiny-imagenet-200"
    for index, number in enumerate(NUMBERS):
        for image in range(3):
            _image(root / "train" / number / "images" / f"{number}_{image}.JPEG", 50 * index)
        (root / "train" / number / f"{number}_boxes.txt").write_text("")
    lines = []
    for index, number in enumerate((*NUMBERS, NUMBERS[0])):
        _image(root / "val" / "images" / f"val_{index}.JPEG", 200 + index)
        lines.append(f"val_{index}.JPEG\t{number}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    _image(root / "test" / "images" / "test_0.JPEG", 255)
    (root / "wnids.txt").write_text("\n".join(NUMBERS) + "\n")
    (root / "words.txt").write_text(WORDS)
    return root


def _values(images: np.ndarray) -> list[int]:
    return [int(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize("how", ["folder", "root", "parent"])
def test_tiny_imagenet_by_folder_and_by_name(tiny: Path, how: str) -> None:
    if how == "folder":
        data = load_data(tiny)
    else:
        data = load_data("tiny-imagenet", root=tiny if how == "root" else tiny.parent)

    assert data.classes == ("goldfish", "European fire salamander", "Egyptian cat")
    assert data.train.need_labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert _values(data.train.images) == [50, 50, 50, 100, 100, 100, 0, 0, 0]
    assert data.test.need_labels().tolist() == [2, 0, 1, 2]
    assert _values(data.test.images) == [200, 201, 202, 203]
    assert data.name == (str(tiny) if how == "folder" else "tiny-imagenet")
    assert data.augmentation == named_augmentation("imagenet", (224, 224))


def test_images_are_kept_small_and_enlarged_in_batches(tiny: Path) -> None:
    data = load_data(tiny)
    assert data.train.images.shape == (9, 3, 64, 64)
    assert (data.preprocessing.input_size, data.preprocessing.resize) == ((224, 224), 256)

    (still,) = Batches(data.test.images, data.preprocessing, 4, shuffle=False)
    training = Batches(data.train.images, data.preprocessing, 9, augmentation=data.augmentation)

    assert still.shape == (4, 3, 224, 224)
    assert next(iter(training)).shape == (9, 3, 224, 224)
    levels = torch.tensor([200, 201, 202, 203]) / 255
    torch.testing.assert_close(still[:, 0, 0, 0], (levels - 0.485) / 0.229, atol=1e-5, rtol=0)


def test_a_wanted_size_and_augmentation_win(tiny: Path) -> None:
    data = load_data(tiny, input_size=(64, 64), augmentation="cifar", mean=(0.5,), std=(0.25,))
    assert (data.preprocessing.input_size, data.preprocessing.resize) == ((64, 64), 73)
    assert data.preprocessing.mean == (0.5, 0.5, 0.5)
    assert data.augmentation == Augmentation(shift=8, fill="mean", flip=True)
    (batch,) = Batches(data.test.images, data.preprocessing, 4, shuffle=False)
    assert batch.shape == (4, 3, 64, 64)


def test_it_is_found_in_the_cache_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQAKD_CACHE", str(tiny.parent))
    assert len(load_data("tiny-imagenet", limit=4).train) == 4


def test_its_absence_says_where_it_was_looked_for() -> None:
    place = re.escape(os.environ["SQAKD_CACHE"])
    with pytest.raises(
        DataError,
        match=rf"^tiny-imagenet is not there: looked for val/val_annotations.txt and wnids.txt in "
        rf"{place} and {place}/tiny-imagenet-200. Fetch http://cs231n.* and unpack it in {place}",
    ):
        load_data("tiny-imagenet")


def test_classes_that_share_a_name_keep_more_of_it(tiny: Path) -> None:
    (tiny / "words.txt").write_text(
        "n01443537\tcrane, bird\nn01629819\tcrane, machine\nn02124075\tcat\n"
    )
    assert load_data(tiny).classes == ("crane, bird", "crane, machine", "cat")
    (tiny / "words.txt").write_text("n01443537\tcrane\nn01629819\tcrane\n")
    assert load_data(tiny).classes == ("crane (n01443537)", "crane (n01629819)", "n02124075")
    (tiny / "words.txt").unlink()
    assert load_data(tiny).classes == tuple(sorted(NUMBERS))


def test_annotations_that_make_no_sense_are_named(tiny: Path) -> None:
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02124075\t0\nval_1.JPEG n9\n")
    with pytest.raises(DataError, match=r"val_annotations.txt, line 2: wanted a file and a number"):
        load_data(tiny)


def test_a_missing_validation_image_is_named(tiny: Path) -> None:
    (tiny / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(DataError, match=r"cannot read .*val_2\.JPEG"):
        load_data(tiny)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val"),
    ],
)
def test_imagenet_is_cropped_as_imagenet(tmp_path: Path, train: str, val: str) -> None:
    for number in NUMBERS:
        for image in range(2):
            _image(tmp_path / train / number / f"{image}.JPEG", 100, size=120)
        _image(tmp_path / val / number / "0.JPEG", 50, size=120)
    if train == "train":  # the test part of ImageNet has no labels
        _image(tmp_path / "test" / "0.JPEG", 0, size=120)

    data = load_data(tmp_path)

    assert data.classes == tuple(sorted(NUMBERS))
    assert data.test.need_labels().tolist() == [0, 1, 2]
    assert data.train.images.shape == (6, 3, 120, 120)  # no larger than they are
    assert (data.preprocessing.input_size, data.preprocessing.resize) == ((224, 224), 256)
    assert data.augmentation == named_augmentation("imagenet", (224, 224))


def test_photographs_of_many_sizes_are_kept_at_the_resized_size(tmp_path: Path) -> None:
    for index, number in enumerate(NUMBERS):
        _image(tmp_path / number / "0.JPEG", 100, size=300 + index)
        _image(tmp_path / number / "1.JPEG", 100, size=300)
    assert load_data(tmp_path).train.images.shape == (3, 3, 256, 256)


def test_a_flat_validation_part_asks_to_be_sorted(tmp_path: Path) -> None:
    for number in NUMBERS:
        _image(tmp_path / "train" / number / "0.JPEG", 1)
    _image(tmp_path / "val" / "0.JPEG", 1)
    with pytest.raises(DataError, match=r"val has no folder named after a class .*; sort its"):
        find_splits(tmp_path)

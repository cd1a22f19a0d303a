"""Folders of a person's own images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sqakd_deploy.data import Augmentation, ReadOptions, load_data, load_folder
from sqakd_deploy.data.layout import images_below
from sqakd_deploy.errors import DataError


def _write(folder: Path, count: int, *, grey: bool = False, size: tuple[int, int] = (9, 8)) -> None:
    """PNG files 000, 001, …, each filled with its own number."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in range(count):
        pixels = np.full(size if grey else (*size, 3), value, np.uint8)
        Image.fromarray(pixels).save(folder / f"{value:03d}.png")


def _values(images: np.ndarray) -> list[int]:
    return [int(image.max()) for image in images]


def test_train_and_test_trees(tmp_path: Path) -> None:
    for part, counts in {"train": (3, 2), "test": (1, 2)}.items():
        for name, count in zip(("dog", "cat"), counts, strict=True):
            _write(tmp_path / part / name, count)

    data = load_data(tmp_path)

    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (5, 3, 9, 8)
    assert data.train.need_labels().tolist() == [0, 0, 1, 1, 1]
    assert _values(data.train.images) == [0, 1, 0, 1, 2]
    assert data.test.need_labels().tolist() == [0, 0, 1]
    assert data.name == str(tmp_path)
    assert data.skipped == ()


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("train", "validation"),
        ("train", "valid"),
        ("training", "testing"),
        ("Train", "Test"),
        ("Training", "Validation"),
        ("TRAIN", "VAL"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
    ],
)
def test_other_names_of_the_parts(tmp_path: Path, train: str, test: str) -> None:
    _write(tmp_path / train / "a", 2)
    _write(tmp_path / train / "b", 2)
    _write(tmp_path / test / "b", 1)  # a class may be absent from the test part

    data = load_data(tmp_path)

    assert data.test.need_labels().tolist() == [1]
    assert data.classes == ("a", "b")


def test_a_tree_without_parts_holds_out_every_tenth(tmp_path: Path) -> None:
    _write(tmp_path / "a", 20)
    _write(tmp_path / "b", 3)

    data = load_data(tmp_path)

    assert _values(data.test.images) == [9, 19, 2]
    assert data.test.need_labels().tolist() == [0, 0, 1]
    assert len(data.train) == 20


def test_train_alone_is_split(tmp_path: Path) -> None:
    _write(tmp_path / "train" / "a", 10)
    _write(tmp_path / "train" / "b", 10)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (18, 2, ("a", "b"))


@pytest.mark.parametrize("name", ["val", "Test", "validation"])
def test_a_test_part_alone_is_split(tmp_path: Path, name: str) -> None:
    _write(tmp_path / name / "a", 10)
    _write(tmp_path / name / "b", 10)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (18, 2, ("a", "b"))


def test_a_test_part_without_labels_gives_way_to_one_with(tmp_path: Path) -> None:
    """As in Tiny-ImageNet with its validation images sorted."""
    for name in ("a", "b"):
        _write(tmp_path / "train" / name / "images", 2)
        _write(tmp_path / "val" / name, 1)
    _write(tmp_path / "test" / "images", 5)
    data = load_data(tmp_path)
    assert data.classes == ("a", "b")
    assert data.test.need_labels().tolist() == [0, 1]


def test_two_test_parts_without_a_training_part_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write(tmp_path / "val" / name, 2)
    _write(tmp_path / "test" / "images", 2)
    with pytest.raises(
        DataError, match=r"holds test and val, but no training part; wanted train .* give .*test,"
    ):
        load_data(tmp_path)


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    for name in ("blood", "test"):
        _write(tmp_path / name, 2)
    assert load_data(tmp_path).classes == ("blood", "test")


def test_a_flat_training_part_beside_other_images_is_ambiguous(tmp_path: Path) -> None:
    for name in ("Bus", "Car", "Train"):
        _write(tmp_path / name, 2)
    with pytest.raises(DataError, match=r"holds Train, flat, beside Bus, Car: a training part, or"):
        load_data(tmp_path)


@pytest.mark.parametrize("inside", [".", "photos", "photos/2024"])
def test_a_flat_folder_has_no_labels(tmp_path: Path, inside: str) -> None:
    _write(tmp_path / inside, 12)

    data = load_data(tmp_path)

    assert (data.classes, data.num_classes) == (None, None)
    assert data.train.labels is None
    assert _values(data.test.images) == [9]
    assert len(data.train) == 11


def test_flat_parts_have_no_labels(tmp_path: Path) -> None:
    _write(tmp_path / "train", 3)
    _write(tmp_path / "test", 2)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (3, 2, None)


def test_junk_is_ignored(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write(tmp_path / name, 2)
    _write(tmp_path / "a" / "nested", 2)
    _write(tmp_path / ".thumbnails", 2)
    _write(tmp_path / "__MACOSX" / "a", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / ".hidden.png").write_text("")
    (tmp_path / "a" / "Thumbs.db").write_text("")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "README.md").write_text("")
    (tmp_path / "b" / "000.png").rename(tmp_path / "b" / "000.PNG")

    data = load_data(tmp_path)

    assert data.classes == ("a", "b")
    assert len(data.train) + len(data.test) == 6


def test_nothing_is_read_from_a_pipe(tmp_path: Path) -> None:
    """Reading one would wait for a writer without end; a link that leads nowhere is said."""
    _write(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    assert [path.name for path in images_below(tmp_path)] == ["000.png", "001.png", "002.png"]
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"cannot read image .*lost\.png: .*No such file"):
        load_data(tmp_path)


def test_large_or_mixed_images_get_the_size_of_photographs(tmp_path: Path) -> None:
    _write(tmp_path / "mixed", 2)
    _write(tmp_path / "large", 2, size=(100, 100))
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "mixed" / "other.png")

    for name in ("mixed", "large"):
        data = load_data(tmp_path / name)
        assert data.train.images.shape[1:] == (3, 224, 224)
        assert data.augmentation == Augmentation(shift=28, fill="mean", flip=True)
    assert data.preprocessing.mean == (0.485, 0.456, 0.406)


def test_images_stored_on_their_side_have_their_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(3):
        Image.new("RGB", (12, 8)).save(tmp_path / f"{index}.jpg", exif=exif)
    assert load_data(tmp_path).preprocessing.input_size == (12, 8)
    Image.new("RGB", (12, 8)).save(tmp_path / "3.jpg")
    assert load_data(tmp_path).preprocessing.input_size == (224, 224)  # of two sizes


def test_a_wanted_size_and_normalisation_win(tmp_path: Path) -> None:
    _write(tmp_path, 3)

    data = load_data(tmp_path, input_size=(16, 12), channels=1, mean=(0.5,), std=(0.5,))

    assert data.train.images.shape == (2, 1, 16, 12)
    assert (data.preprocessing.mean, data.preprocessing.std) == ((0.5,), (0.5,))


def test_grayscale_files_are_read_as_such(tmp_path: Path) -> None:
    _write(tmp_path, 3, grey=True)
    data = load_data(tmp_path)
    assert data.train.images.shape == (2, 1, 9, 8)
    assert data.augmentation == Augmentation(shift=1, flip=False)
    assert len(data.preprocessing.mean) == 1


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_of_16_bits_is_grey_in_either_order_of_bytes(order: str, tmp_path: Path) -> None:
    for value in range(3):
        pixels = np.full((9, 8), 256 * value, np.uint16)
        mode = "I;16" if order == "<u2" else "I;16B"
        image = Image.frombytes(mode, (8, 9), pixels.astype(order).tobytes())
        image.save(tmp_path / f"{value}.tif")
    data = load_data(tmp_path)
    assert _values(data.train.images) == [0, 1]
    assert data.train.images.shape == (2, 1, 9, 8)


def test_grayscale_files_as_rgb(tmp_path: Path) -> None:
    """For a model of photographs: its own mean in each channel, and still no mirroring."""
    _write(tmp_path, 3, grey=True)
    data = load_data(tmp_path, channels=3)
    assert data.train.images.shape == (2, 3, 9, 8)
    assert _values(data.train.images) == [0, 1]
    assert (data.train.images == data.train.images[:, :1]).all()
    assert data.preprocessing.mean == (0.485, 0.456, 0.406)
    assert data.augmentation == Augmentation(shift=1, flip=False)


def test_rgb_files_as_grayscale(tmp_path: Path) -> None:
    """Their luma as Pillow computes it, of JPEGs, too; each choice has a cache of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.jpg")
    for _ in range(2):  # built, and found
        assert load_data(tmp_path).train.images.shape == (3, 3, 8, 8)
        data = load_data(tmp_path, channels=1)
        with Image.open(tmp_path / "0.jpg") as image:
            np.testing.assert_array_equal(data.train.images[0, 0], np.asarray(image.convert("L")))
    assert data.augmentation == Augmentation(shift=1, fill="mean", flip=True)
    assert data.preprocessing.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)


def test_a_limit_is_spread_over_the_classes(tmp_path: Path) -> None:
    for name in "abcd":
        _write(tmp_path / "train" / name, 5)
        _write(tmp_path / "test" / name, 5)
    seen: list[tuple[int, int]] = []
    options = ReadOptions(limit=4, progress=lambda done, total: seen.append((done, total)))

    data = load_folder(tmp_path, options)

    assert data.train.need_labels().tolist() == [0, 1, 2, 3]
    assert seen == [(8, 8)]  # the rest was never opened


def test_a_corrupt_image_stops_or_is_skipped_and_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write(tmp_path / "train" / name, 3)
        _write(tmp_path / "test" / name, 1)
    bad = tmp_path / "train" / "a" / "001.png"
    bad.write_bytes(b"not a picture")

    with pytest.raises(DataError) as caught:
        load_data(tmp_path)
    assert str(bad) in str(caught.value)
    data = load_data(tmp_path, skip_bad_images=True)

    assert data.skipped == (str(bad),)
    assert _values(data.train.images) == [0, 2, 0, 1, 2]
    assert data.train.need_labels().tolist() == [0, 0, 1, 1, 1]
    assert data.test.need_labels().tolist() == [0, 1]


def test_a_folder_of_corrupt_images(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_text("no")
    with pytest.raises(DataError, match=r"^none of the 3 images in .* can be read$"):
        load_data(tmp_path, skip_bad_images=True)


def test_all_of_one_part_corrupt(tmp_path: Path) -> None:
    _write(tmp_path / "train", 2)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_text("no")
    with pytest.raises(DataError, match=r"no image is left in the test part$"):
        load_data(tmp_path, skip_bad_images=True)


def test_an_empty_folder_says_what_was_searched_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError) as caught:
        load_data(tmp_path)
    assert str(caught.value) == (
        f"no images in {tmp_path}; searched for "
        ".bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    )


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_text("")
    with pytest.raises(
        DataError, match=r"^data folder .*archive\.zip is not a folder; name a folder of images"
    ):
        load_data(tmp_path / "archive.zip")


def test_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    with pytest.raises(DataError, match=r"^wanted at least 2 images, .* found only .*000\.png$"):
        load_data(tmp_path)


def test_images_beside_class_folders_are_ambiguous(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    _write(tmp_path / "a", 1)
    _write(tmp_path / "b", 1)
    with pytest.raises(DataError, match=r"holds 1 images beside 2 folders of images; wanted one"):
        load_data(tmp_path)


def test_the_test_part_has_the_classes_of_the_training_part(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write(tmp_path / "train" / name, 1)
    _write(tmp_path / "test" / "a", 1)
    _write(tmp_path / "test" / "c", 1)
    with pytest.raises(DataError, match=r"has classes that the training part lacks: c$"):
        load_data(tmp_path)


@pytest.mark.parametrize("inside", [".", "images"])
def test_the_test_part_has_class_folders_if_the_training_part_has(
    tmp_path: Path, inside: str
) -> None:
    for name in ("a", "b"):
        _write(tmp_path / "train" / name, 1)
    _write(tmp_path / "test" / inside, 1)
    with pytest.raises(
        DataError, match=r"test has no folder named after a class of the training part, as a; sort"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ["images are normalised by ImageNet's mean and std (--mean, --std)"]),
        ({"mean": (0.5,)}, ["images are normalised by ImageNet's std (--std)"]),
        ({"mean": (0.5,), "std": (0.5,)}, []),
    ],
)
def test_a_normalisation_that_nobody_gave_is_said(
    given: dict[str, tuple[float]], said: list[str], tmp_path: Path
) -> None:
    _write(tmp_path, 3)
    messages: list[str] = []
    data = load_data(tmp_path, message=messages.append, **given)  # type: ignore[arg-type]
    assert messages == said
    load_data(tmp_path, message=messages.append, preprocessing=data.preprocessing)
    assert messages == said


NORMALISED = "images are normalised by ImageNet's mean and std (--mean, --std)"
PHOTOGRAPHS = "images are cropped about their centre and resized to 224×224 pixels (--input-size)"
IMAGENETS = (
    "images are resized to 256 pixels on their short side and cropped to 224×224 pixels "
    "(--input-size)"
)


@pytest.mark.parametrize(
    ("size", "folder", "given", "said"),
    [
        ((120, 100), "cat", {}, [PHOTOGRAPHS, NORMALISED]),
        ((120, 100), "cat", {"input_size": (9, 8)}, [NORMALISED]),
        ((9, 8), "cat", {}, [NORMALISED]),
        ((120, 100), "n0144076", {}, [IMAGENETS, NORMALISED]),
    ],
)
def test_a_size_that_nobody_gave_is_said(
    size: tuple[int, int], folder: str, given: dict[str, tuple[int, int]], said: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Where images do not have it already."""
    for part in ("train", "test"):
        for number in ("1", "2"):
            _write(tmp_path / part / f"{folder}{number}", 2, size=size)
    messages: list[str] = []
    data = load_data(tmp_path, message=messages.append, **given)  # type: ignore[arg-type]
    assert messages == said
    load_data(tmp_path, message=messages.append, preprocessing=data.preprocessing)
    assert messages == said


def test_images_that_are_left_out_are_counted(tmp_path: Path) -> None:
    _write(tmp_path, 3)
    _write(tmp_path / "more" / "deep", 2)
    messages: list[str] = []
    data = load_data(tmp_path, message=messages.append, mean=(0.5,), std=(0.5,))
    assert len(data.train) + len(data.test) == 3
    assert messages == [
        f"{tmp_path}: 2 images in 1 subfolder are left out, beside 3 that lie in the folder itself"
    ]

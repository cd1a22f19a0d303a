"""Data by name, and changes of size to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sqakd_deploy.config import DataConfig
from sqakd_deploy.data import (
    DATASETS,
    Augmentation,
    Dataset,
    ImageData,
    ImageSplit,
    Preprocessing,
    load_data,
)
from sqakd_deploy.data.digits import load_digits
from sqakd_deploy.errors import DataError, SpecError


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(DataError) as caught:
        load_data("digit")
    assert str(caught.value) == (
        "unknown data set 'digit'. Did you mean 'digits'? There are: cifar10, cifar100, digits, "
        "tiny-imagenet. "
        "Nor is there a folder of that name."
    )


def test_a_path_that_does_not_exist_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data folder .*pictures does not exist; name a folder"):
        load_data(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"^data folder sub/pictures does not exist; name a folder"):
        load_data("sub/pictures")


def test_every_data_set_says_what_it_is() -> None:
    assert list(DATASETS) == ["cifar10", "cifar100", "digits", "tiny-imagenet"]
    assert all(dataset.summary for _, dataset in DATASETS.items())


def test_a_loader_may_be_a_function_and_is_given_the_root(tmp_path: Path) -> None:
    roots: list[Path | None] = []

    def loader(root: Path | None) -> ImageData:
        roots.append(root)
        return load_digits()

    assert len(Dataset("digits again", loader).load(tmp_path).train) == 1437
    assert roots == [tmp_path]


def test_digits_for_a_network_of_large_colour_images() -> None:
    data = load_data("digits", input_size=(32, 24), channels=3, limit=10)

    assert data.train.images.shape == (10, 3, 32, 24)
    assert data.preprocessing == Preprocessing(
        channels=3, input_size=(32, 24), mean=(0.3058,) * 3, std=(0.3761,) * 3
    )
    assert data.augmentation == Augmentation(shift=3)  # pixels: three times as far
    red, green, blue = (data.train.images[:, c] for c in range(3))
    np.testing.assert_array_equal(red, green)
    np.testing.assert_array_equal(red, blue)


def test_mean_and_std_can_be_those_of_a_trained_model() -> None:
    data = load_data("digits", mean=(0.5,), std=(0.25,))
    assert data.preprocessing.mean == (0.5,)
    assert data.preprocessing.std == (0.25,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": 2}, r"^channels: wanted 1 \(grayscale\) or 3 \(RGB\), got 2$"),
        ({"limit": 0}, r"^limit: wanted at least 1 image, got 0$"),
        (
            {"mean": (0.1, 0.2)},
            r"^mean: wanted one value, since the images have one channel, grey, got 2$",
        ),
        ({"std": (0.0,)}, r"^preprocessing: std.0: Input should be greater than 0, got 0.0$"),
        (
            {"input_size": (0, 8)},
            r"^preprocessing: input_size.0: Input should be greater than or equal to 1, got 0$",
        ),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_data("digits", **wrong)  # type: ignore[arg-type]


def test_a_limit_keeps_every_class() -> None:
    data = load_data("digits", limit=100)

    assert len(data.train) == len(data.test) == 100
    assert np.unique(data.train.need_labels()).tolist() == list(range(10))


def test_labels_that_are_not_there_are_explained() -> None:
    images = np.zeros((2, 1, 4, 4), np.uint8)
    with pytest.raises(DataError, match=r"^these images have no labels, which supervised training"):
        ImageSplit(images).need_labels()


def test_splits_refuse_what_is_no_image() -> None:
    with pytest.raises(
        DataError, match=r"^images: wanted uint8 of shape \(N, C, H, W\), got float"
    ):
        ImageSplit(np.zeros((2, 1, 4, 4), np.float32))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^labels: wanted int64 of shape \(2,\), one for each"):
        ImageSplit(np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"^labels: wanted class indices from 0, got -1$"):
        ImageSplit(np.zeros((1, 1, 4, 4), np.uint8), np.array([-1]))


def test_a_path_in_a_config_is_a_folder_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    config = DataConfig(source=Path("./digits"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="digits"):  # it is empty
        load_data(config.source)
    assert len(load_data("digits").classes) == 10

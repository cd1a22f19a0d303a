"""CIFAR through torchvision, on generated files of its layout."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from sqakd_deploy.data import Augmentation, load_data
from sqakd_deploy.data.options import cache_folder
from sqakd_deploy.errors import DataError


def _dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))


def _pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def _any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists()
    )


@pytest.mark.usefixtures("_any_checksum")
def test_cifar10_is_read_in_its_order(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR10.base_folder
    for index in range(1, 6):
        _dump(folder / f"data_batch_{index}", {"data": _pixels(4, index), "labels": [0, 1, 2, 3]})
    _dump(folder / "test_batch", {"data": _pixels(2, 9), "labels": [7, 8]})
    _dump(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})

    data = load_data("cifar10", root=tmp_path)

    assert data.train.images.shape == (20, 3, 32, 32)
    np.testing.assert_array_equal(data.train.images[4:8].reshape(4, -1), _pixels(4, 2))
    assert data.test.need_labels().tolist() == [7, 8]
    assert data.classes == tuple(f"class {i}" for i in range(10))
    assert data.augmentation == Augmentation(shift=4, fill="mean", flip=True)
    assert data.preprocessing.std == (0.2023, 0.1994, 0.2010)


@pytest.mark.usefixtures("_any_checksum")
def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / CIFAR100.base_folder
    for part, seed in (("train", 0), ("test", 1)):
        labels = {"fine_labels": [5, 99], "coarse_labels": [1, 1]}
        _dump(folder / part, {"data": _pixels(2, seed), **labels})
    _dump(folder / "meta", {"fine_label_names": [f"f{i}" for i in range(100)]})

    data = load_data("cifar100", root=tmp_path)

    assert data.train.need_labels().tolist() == [5, 99]
    assert data.num_classes == 100
    assert data.preprocessing.mean == (0.5071, 0.4867, 0.4408)


def test_without_a_network_it_says_where_to_put_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError) as caught:
        load_data("cifar10", root=tmp_path)
    assert str(caught.value) == (
        f"cifar10 is not in {tmp_path} and cannot be downloaded (<urlopen error no route to "
        "host>). Where there is a network, fetch cifar-10-python.tar.gz and unpack it so that "
        f"{tmp_path / 'cifar-10-batches-py'} exists, or set SQAKD_CACHE to "
        "the folder that holds cifar-10-batches-py"
    )


def test_files_of_a_stranger_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("offline")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.cifar.pickle.load", pytest.fail)
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        _dump(tmp_path / CIFAR10.base_folder / name, {})
    with pytest.raises(DataError, match=r"^cifar10 is not in"):
        load_data("cifar10", root=tmp_path)


def test_the_cache_follows_the_desktop_convention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == Path(os.environ["SQAKD_CACHE"])
    monkeypatch.delenv("SQAKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sqakd-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/sqakd-deploy")

"""Arrays whose resized form would not fit into memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from sqakd_deploy.data import Dataset, ImageData, Preprocessing, ReadOptions, from_arrays
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.data.decode import fit_images
from sqakd_deploy.data.fitted import FittedImages, chosen
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.options import Keeping
from sqakd_deploy.data.preprocessing import named_augmentation

SIZE = (448, 448)
PUBLISHED = Preprocessing(
    channels=3, input_size=(224, 224), resize=448, mean=(0.5,) * 3, std=(0.25,) * 3
)
MOST = 100 << 20  # bytes: a batch and what is made of it, of 1.2 GB

# A test's process has threads by then; the worker touches nothing that those hold.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def _small(root: Path | None = None) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (2040, 3, 8, 8), dtype=np.uint8)
    return from_arrays(images[:2000], test_images=images[2000:])


def test_memory_is_bounded_and_batches_stay_the_same() -> None:
    said: list[str] = []
    options = ReadOptions(preprocessing=PUBLISHED, keeping=Keeping(workers=0), message=said.append)
    tracemalloc.start()
    try:
        data = Dataset("small ones", _small).load(options=options)
        batches = Batches(
            data.train.images,
            data.preprocessing,
            16,
            augmentation=named_augmentation("cifar", SIZE),
        )
        batch = next(iter(batches))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < MOST
    assert data.train.images.shape == (2000, 3, *SIZE)
    (text,) = said  # of the test part, 24 MB are kept
    assert text == (
        "2000 images of 448×448 pixels are 1.12 GiB, too much for memory: no worker processes "
        "resize them when they are read"
    )
    indices, again = next(batches.indexed())
    eager = fit_images(_small().train.images[indices], 3, SIZE)
    np.testing.assert_array_equal(data.train.images[indices], eager)
    assert torch.equal(again, batch)
    assert isinstance(data.test.images, np.ndarray)


def test_a_worker_makes_the_same_batches() -> None:
    source = _small().test.images
    here, there = (FittedImages(source, 1, (16, 12), workers=workers) for workers in (0, 1))
    grey = Preprocessing(channels=1, input_size=(16, 12), mean=(0.5,), std=(0.25,))
    pairs = zip(Batches(here, grey, 16), Batches(there, grey, 16), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)


def test_fitted_images_are_indexed_as_an_array() -> None:
    source = _small().test.images
    fitted, eager = FittedImages(source, 3, (9, 9)), np.asarray(fit_images(source, 3, (9, 9)))
    np.testing.assert_array_equal(fitted[3], eager[3])
    np.testing.assert_array_equal(fitted[5:9][np.array([2, 0])], eager[[7, 5]])


def test_chosen_images_are_read_when_asked_for(tmp_path: Path) -> None:
    source = _small().test.images
    which = np.array([7, 3, 5])
    np.testing.assert_array_equal(chosen(source, which)[np.arange(3)], source[which])
    again = chosen(chosen(source, which), np.array([2, 0]))
    np.testing.assert_array_equal(again[np.arange(2)], source[[5, 7]])
    files = ImageFiles(tmp_path, [tmp_path / "a", tmp_path / "b"], 3, (4, 4), workers=2)
    some = chosen(files, np.array([1]))
    assert isinstance(some, ImageFiles)
    assert (some.names.tolist(), some.workers) == ([b"b"], 2)

"""Data sets from a script's own arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqakd_deploy.data import Augmentation, from_arrays
from sqakd_deploy.data.splits import held_out, spread
from sqakd_deploy.errors import DataError


def _images(count: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, 4, 6), dtype=np.uint8)


def test_arrays_keep_their_values_and_are_split_by_class() -> None:
    images, labels = _images(40), np.arange(40) % 2

    data = from_arrays(images, labels, classes=["cat", "dog"])

    # The tenth and twentieth image of each class, in the order given.
    held = [18, 19, 38, 39]
    np.testing.assert_array_equal(data.test.images, images[held])
    np.testing.assert_array_equal(data.train.images, np.delete(images, held, axis=0))
    assert data.test.need_labels().tolist() == [0, 1, 0, 1]
    assert data.classes == ("cat", "dog")
    assert data.augmentation == Augmentation()


def test_mean_and_std_are_measured_on_the_training_images() -> None:
    images = _images(20)

    preprocessing = from_arrays(images, test_images=images[:1] * 0).preprocessing

    np.testing.assert_allclose(preprocessing.mean, (images / 255).mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(preprocessing.std, (images / 255).std((0, 2, 3)), atol=1e-4)


def test_images_of_one_colour_can_be_divided_by_their_spread() -> None:
    assert from_arrays(np.full((4, 1, 2, 2), 9, np.uint8)).preprocessing.std == (1.0,)


def test_unlabelled_grayscale_without_a_channel_axis() -> None:
    data = from_arrays(_images(12)[:, 0])

    assert data.train.images.shape == (11, 1, 4, 6)
    assert (data.train.labels, data.test.labels, data.classes) == (None, None, None)


def test_classes_are_numbered_when_they_have_no_names() -> None:
    data = from_arrays(_images(4), np.array([0, 2, 0, 2], np.uint8))
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        (np.zeros(4), {}, "^labels: wanted integers, got float64$"),
        (
            np.zeros(4, int),
            {"test_images": _images(2)},
            "^wanted labels for training and test images, or for neither$",
        ),
        (
            np.array([0, 1, 2, 0]),
            {"classes": ["a", "b"]},
            "^labels go up to 2, but there are 2 class names$",
        ),
        (
            None,
            {"test_images": _images(2, channels=1)},
            r"^images: wanted uint8 of shape \(N, 3, 4, 6\), got uint8 of shape \(2, 1, 4, 6\)$",
        ),
        (
            None,
            {"test_images": _images(0)},
            "^arrays: no image is left in the test part$",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    labels: np.ndarray | None, kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(_images(4), labels, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [list, torch.from_numpy, np.ndarray.tolist])
def test_labels_need_not_be_an_array(form: Callable[[np.ndarray], Any]) -> None:
    images, labels = _images(40), np.arange(40) % 2
    data = from_arrays(torch.from_numpy(images), form(labels))  # type: ignore[arg-type]
    assert data.train.need_labels().tolist() == [0, 1] * 18
    np.testing.assert_array_equal(data.test.images, images[[18, 19, 38, 39]])


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (_images(0), {}, "^arrays: wanted images to train on, got none$"),
        (_images(0)[:, 0], {"test_images": _images(2)[:, 0]}, "^arrays: wanted images to train on"),
        (_images(4), {"test_labels": [0, 1]}, "^test_labels: wanted test_images with them; give"),
        (_images(4), {"labels": [[0], [1, 2]]}, "^labels: wanted an array, got a list: "),
        (
            np.zeros((20, 8, 8, 3), np.uint8),
            {},
            r"^images: wanted 1 or 3 channels, .* got shape \(20, 8, 8, 3\); channels come last",
        ),
        (_images(4, channels=4), {}, r"^images: .* got shape \(4, 4, 4, 6\)$"),
        (_images(4), {"test_images": _images(2, channels=2)}, "^test_images: wanted 1 or 3 chann"),
    ],
)
def test_arrays_that_are_no_images_are_refused(
    images: np.ndarray, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(images, **kwargs)


@given(st.integers(2, 500))
def test_a_tenth_is_held_out(count: int) -> None:
    held = held_out(count)
    assert held.sum() == max(1, count // 10)
    assert not held_out(1).any()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_each_class_has_images_in_both_parts(labels: list[int]) -> None:
    array = np.array(labels, np.int64)
    held = held_out(len(array), array)
    for label in set(labels):
        of_class = held[array == label]
        assert of_class.sum() == (max(1, len(of_class) // 10) if len(of_class) > 1 else 0)


@given(st.integers(0, 300), st.none() | st.integers(1, 400))
def test_spread_indices_are_distinct_and_reach_over_everything(
    count: int, limit: int | None
) -> None:
    indices = spread(count, limit)
    assert len(indices) == (count if limit is None else min(count, limit))
    steps = np.diff(indices)
    assert (steps > 0).all()
    if len(steps):
        assert steps.max() - steps.min() <= 1
        assert count - indices[-1] <= -(-count // len(indices))

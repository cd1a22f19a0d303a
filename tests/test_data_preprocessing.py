"""What a model is given."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sqakd_deploy.data import Preprocessing
from sqakd_deploy.errors import DataError, SpecError

RGB = Preprocessing(channels=3, input_size=(2, 4), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))


def test_apply_is_the_formula() -> None:
    images = np.arange(48, dtype=np.uint8).reshape(2, 3, 2, 4) * 5

    got = RGB.apply(images)

    assert got.dtype == np.float32
    for c in range(3):
        wanted = (images[:, c] / 255 - RGB.mean[c]) / RGB.std[c]
        np.testing.assert_allclose(got[:, c], wanted, rtol=0, atol=1e-6)  # float32 rounding


def test_json_round_trip() -> None:
    text = RGB.model_dump_json()

    assert json.loads(text) == {
        "channels": 3,
        "input_size": [2, 4],
        "resize": None,
        "mean": [0.5, 0.25, 0.0],
        "std": [0.5, 0.25, 1.0],
    }
    assert Preprocessing.model_validate_json(text) == RGB


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError) as caught:
        RGB.apply(np.zeros((5, 1, 2, 4), np.uint8))
    assert str(caught.value) == (
        "images: wanted uint8 of shape (N, 3, 2, 4), got uint8 of shape (5, 1, 2, 4)"
    )


def test_each_channel_has_its_values() -> None:
    with pytest.raises(SpecError, match=r"^std: wanted one value for each of 2 channels, got 1$"):
        Preprocessing(channels=2, input_size=(2, 2), mean=(0.0, 0.0), std=(1.0,))


def test_a_change_of_channels_averages_the_values() -> None:
    assert RGB.changed(channels=1) == Preprocessing(
        channels=1, input_size=(2, 4), mean=(0.25,), std=(1.75 / 3,)
    )


def test_a_change_of_nothing_changes_nothing() -> None:
    assert RGB.changed() == RGB


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (1.0, 1 / 255)])
def test_what_models_are_trained_with_is_accepted(mean: float, std: float) -> None:
    """-1 to 1, 0 to 1, and the mean of 0 to 255 alone taken off."""
    assert RGB.changed(mean=(mean,), std=(std,)).std == (std,) * 3


@pytest.mark.parametrize("name", ["mean", "std"])
def test_values_on_the_scale_of_pixels_are_refused(name: str) -> None:
    with pytest.raises(SpecError, match=rf"{name}\.0, .*: wanted 0 to 1; .* by 255, got 125\.0"):
        RGB.changed(**{name: (125.0,)})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=rf"{name}\.0, .*: wanted 0 to 1, got -0\.1"):
        RGB.changed(**{name: (-0.1,)})  # type: ignore[arg-type]

"""The embedded digits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from sqakd_deploy.data import Augmentation, load_data
from sqakd_deploy.data.arrays import measured
from sqakd_deploy.data.digits import PREPROCESSING


def test_the_split_is_that_of_every_release() -> None:
    data = load_data("digits")

    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    # Counted once by hand from the rule; another split would make old and new reports differ.
    test_counts = np.bincount(data.test.need_labels())
    assert test_counts.tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    train_counts = np.bincount(data.train.need_labels())
    assert train_counts.tolist() == [142, 146, 141, 147, 144, 146, 145, 143, 139, 144]


def test_the_first_of_each_class_opens_the_test_part() -> None:
    # The file begins with the digits 0 to 9 in order. By the rule the first 0 is held out.
    data = load_data("digits")

    first_zero = [0, 0, 5, 13, 9, 1, 0, 0]  # top row of the file's first image
    assert data.test.images[0, 0, 0].tolist() == [round(v * 255 / 16) for v in first_zero]
    assert data.test.need_labels()[0] == 0


def test_no_training_image_is_in_the_test_part() -> None:
    data = load_data("digits")

    train = {image.tobytes() for image in data.train.images}
    assert not [image for image in data.test.images if image.tobytes() in train]


def test_values_span_eight_bits() -> None:
    images = load_data("digits").train.images

    assert images.dtype == np.uint8
    assert np.unique(images).tolist() == [round(v * 255 / 16) for v in range(17)]


def test_preprocessing_is_that_of_the_training_part() -> None:
    assert measured(load_data("digits").train.images) == PREPROCESSING


def test_digits_are_shifted_and_never_mirrored() -> None:
    data = load_data("digits")

    assert data.augmentation == Augmentation(shift=1, flip=False)
    assert data.classes == tuple("0123456789")
    assert data.num_classes == 10


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys; from sqakd_deploy.data import load_data, DATASETS; load_data('digits'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

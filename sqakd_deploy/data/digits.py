"""The embedded data set: handwritten digits.

"Optical Recognition of Handwritten Digits", test set: 1,797 images of 8×8 pixels, values 0 to 16.
E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository, doi:10.24432/C50P49, licence
CC BY 4.0 (``assets/LICENSE-digits.txt``).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing
from sqakd_deploy.data.splits import ImageData, ImageSplit

_INK = 16  # darkest value in the file
_EVERY = 5

# Mean and standard deviation of the 1,437 training images.
PREPROCESSING = Preprocessing(channels=1, input_size=(8, 8), mean=(0.3058,), std=(0.3761,))


def load_digits(root: Path | None = None) -> ImageData:
    """1,437 training and 360 test images ``(N, 1, 8, 8)``, values rescaled to 0 to 255.

    The test part is fixed by a rule without random numbers: images ordered by class, and within a
    class by their order in the file; every fifth is held out, beginning with the first. Both
    parts hold all 13 writers.

    Args:
        root: unused; the images are part of the package.
    """
    images, labels = _read()
    test = _is_test(labels)
    return ImageData(
        name="digits",
        train=ImageSplit(images[~test], labels[~test]),
        test=ImageSplit(images[test], labels[test]),
        classes=tuple("0123456789"),
        preprocessing=PREPROCESSING,
        augmentation=Augmentation(shift=1),  # a mirrored digit is no digit
    )


def _read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    asset = files("sqakd_deploy.data") / "assets" / "digits.npz"
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        values, labels = arrays["images"], arrays["labels"]
    scaled = np.rint(values.astype(np.float64) * (255 / _INK)).astype(np.uint8)
    return scaled[:, None], labels.astype(np.int64)


def _is_test(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    by_class = np.argsort(labels, kind="stable")
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[by_class[::_EVERY]] = True
    return mask

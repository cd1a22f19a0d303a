"""What happens to an image before a model sees it, in training and in deployment."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sqakd_deploy.errors import DataError, SpecError
from sqakd_deploy.spec import Spec

Positive = Annotated[int, Field(ge=1)]
Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Mean = Annotated[float, Field(allow_inf_nan=False)]


class Preprocessing(Spec):
    """``x = (image / 255 − mean) / std``, channel by channel, in float32.

    Images of another size are cropped about their centre to the aspect of ``input_size`` and
    resized to it (bilinear). The JSON form travels in the metadata of an ONNX file, so that a
    person who has only the file can prepare images for it.

    Attributes:
        channels: 1 for grayscale, 3 for RGB in that order.
        input_size: height and width (pixels).
        mean: one value a channel, on the scale 0 to 1.
        std: one value a channel, on the scale 0 to 1.
    """

    channels: Positive
    input_size: tuple[Positive, Positive]
    mean: tuple[Mean, ...]
    std: tuple[Std, ...]

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Preprocessing:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise SpecError(
                    f"{name}: wanted one value for each of {self.channels} channels, "
                    f"got {len(values)}"
                )
        return self

    def apply(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Prepare images for a model.

        Args:
            images: uint8 ``(N, C, H, W)`` of this size and these channels.

        Returns:
            float32 ``(N, C, H, W)``, bit for bit what the training batches hold on a CPU.

        Raises:
            DataError: if the images have another shape or type.
        """
        self.check(images)
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        scaled = images.astype(np.float32) / np.float32(255)
        return (scaled - mean) / std

    def check(self, images: NDArray[np.uint8]) -> None:
        """Refuse images of another shape or type.

        Raises:
            DataError: if they are not uint8 ``(N, C, H, W)`` with this C, H and W.
        """
        wanted = (self.channels, *self.input_size)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
            raise DataError(
                f"images: wanted uint8 of shape (N, {', '.join(map(str, wanted))}), "
                f"got {images.dtype} of shape {images.shape}"
            )

    def changed(
        self,
        *,
        channels: int | None = None,
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Preprocessing:
        """The same with some values replaced; None keeps a value.

        A change of channels alone repeats the values of a single channel, or averages several.

        Raises:
            SpecError: if a value is out of range or not given for each channel.
        """
        channels = self.channels if channels is None else channels
        values = {
            "channels": channels,
            "input_size": input_size or self.input_size,
            "mean": mean or _over_channels(self.mean, channels),
            "std": std or _over_channels(self.std, channels),
        }
        return Preprocessing.parse(values, "preprocessing")


def _over_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


class Augmentation(Spec):
    """Random changes to training images; see :mod:`sqakd_deploy.data.augment`.

    Attributes:
        shift: largest shift in each direction (pixels); black moves in. It equals a random crop
            after padding by as much (He et al., 2016, use 4 on CIFAR).
        flip: mirror half of the images left to right.
    """

    shift: Annotated[int, Field(ge=0)] = 0
    flip: bool = False

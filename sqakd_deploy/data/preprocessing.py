"""What happens to an image before a model sees it, in training and in deployment."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from sqakd_deploy.data.images import Images
from sqakd_deploy.errors import DataError, SpecError
from sqakd_deploy.registry import unknown_name
from sqakd_deploy.spec import Spec


def _on_unit_scale(value: float) -> float:
    if 0 <= value <= 1:
        return value
    hint = "; divide what counts from 0 to 255 by 255" if value > 1 else ""
    raise PydanticCustomError("scale", "wanted 0 to 1{hint}", {"hint": hint})


Positive = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=1, le=4096)]  # beyond which an image is a typing error
Share = Annotated[float, Field(gt=0, le=1)]
Mean = Annotated[float, AfterValidator(_on_unit_scale)]
Std = Annotated[float, AfterValidator(_on_unit_scale), Field(gt=0)]


class Preprocessing(Spec):
    """``x = (image / 255 − mean) / std``, channel by channel, in float32.

    Images of another size are cropped about their centre to the aspect of ``input_size`` and
    resized to it (bilinear); or, with ``resize``, they are resized until their short side has so
    many pixels and then cropped about their centre to ``input_size``. The JSON form travels in the
    metadata of an ONNX file, so that a person who has only the file can prepare images for it.

    Attributes:
        channels: 1 for grayscale, 3 for RGB in that order.
        input_size: height and width (pixels), at most 4096.
        mean: one value a channel, 0 to 1.
        std: one value a channel, above 0, at most 1.
        resize: short side before the crop (pixels), as ImageNet models are tested; at least that
            of ``input_size``.
    """

    channels: Positive
    input_size: tuple[Pixels, Pixels]
    resize: Positive | None = None
    mean: tuple[Mean, ...]
    std: tuple[Std, ...]

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Preprocessing:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                wanted = f"one value for each of {self.channels} channels"
                if self.channels == 1:
                    wanted = "one value, since the images have one channel, grey"
                raise SpecError(f"{name}: wanted {wanted}, got {len(values)}")
        if self.resize is not None and self.resize < min(self.input_size):
            raise SpecError(
                f"resize: wanted at least {min(self.input_size)}, the short side of the input, "
                f"got {self.resize}"
            )
        return self

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width (pixels) of images that still have to be cropped, if they have to."""
        height, width = self.input_size
        if self.resize is None:
            return height, width
        short = min(height, width)
        return round(height * self.resize / short), round(width * self.resize / short)

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

    def check(self, images: Images) -> None:
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

    def check_stored(self, images: Images) -> None:
        """Refuse images that a batch cannot be made of; with ``resize`` they may have any size.

        Raises:
            DataError: if they are not uint8 ``(N, C, H, W)`` with this C, or without ``resize``
                have another H and W.
        """
        sized = (self.channels, *images.shape[2:4])
        if self.resize is None or images.dtype != np.uint8 or images.shape[1:] != sized:
            self.check(images)

    def changed(
        self,
        *,
        channels: int | None = None,
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> Preprocessing:
        """The same with some values replaced; None keeps a value.

        A change of channels alone repeats the values of a single channel, or averages several. A
        single value of mean or std is for all channels. ``resize`` keeps its ratio to the input.

        Raises:
            SpecError: if a value is out of range or not given for each channel.
        """
        channels = self.channels if channels is None else channels
        values: dict[str, Any] = {
            "channels": channels,
            "input_size": input_size or self.input_size,
            "mean": _given(mean, channels) or _over_channels(self.mean, channels),
            "std": _given(std, channels) or _over_channels(self.std, channels),
        }
        if self.resize is not None:
            ratio = self.resize / min(self.input_size)
            values["resize"] = round(ratio * min(values["input_size"]))
        return Preprocessing.parse(values, "preprocessing")


def _over_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def _given(values: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    return values * channels if values and len(values) == 1 else values


class Augmentation(Spec):
    """Random changes to training images; see :mod:`sqakd_deploy.data.augment`.

    Attributes:
        shift: largest shift in each direction (pixels). It equals a random crop after padding by as
            much (He et al., 2016, use 4 on CIFAR).
        fill: what moves in: ``black``, for images on a black ground, or the ``mean`` colour, which
            is 0 once normalised. Black frames photographs as no test image is framed.
        flip: mirror half of the images left to right.
        area: least and largest share of an image that a random crop keeps, at an aspect between
            3/4 and 4/3 (Szegedy et al., 2015); None crops nothing. Excludes ``shift``.
        colour: brightness, contrast and saturation are each multiplied by a factor in
            ``[1 − colour, 1 + colour]``.
    """

    shift: Annotated[int, Field(ge=0)] = 0
    fill: Literal["black", "mean"] = "black"
    flip: bool = False
    area: tuple[Share, Share] | None = None
    colour: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> Augmentation:
        if self.area is not None and self.area[0] > self.area[1]:
            raise SpecError(f"area: wanted the smaller share first, got {self.area}")
        if self.area is not None and self.shift:
            raise SpecError("augmentation: shift and area are two ways to crop; give one")
        return self

    def at(self, ratio: float) -> Augmentation:
        """What looks the same on images whose sides are so many times as long."""
        return self.model_copy(update={"shift": round(ratio * self.shift)})


def named_augmentation(name: str, input_size: tuple[int, int]) -> Augmentation:
    """The augmentation that papers use on a kind of images.

    ``cifar`` shifts by an eighth of the size (4 pixels of 32), the mean colour moving in, and
    flips. ``imagenet`` crops 8 to 100 % of the image, flips, and changes brightness, contrast and
    saturation by up to 20 %, as SQAKD does on Tiny-ImageNet; its change of hue, a tenth of a
    degree, is left out.

    Raises:
        SpecError: if there is no such name.
    """
    known = {
        "none": Augmentation(),
        "cifar": Augmentation(shift=min(input_size) // 8, fill="mean", flip=True),
        "imagenet": Augmentation(area=(0.08, 1.0), flip=True, colour=0.2),
    }
    if name not in known:
        raise SpecError(unknown_name("augmentation", name, list(known)))
    return known[name]


def chosen_augmentation(
    wanted: Augmentation | str | None, usual: Augmentation, preprocessing: Preprocessing
) -> Augmentation:
    """What a person wants, by value or by name, or else what is usual for the data.

    Raises:
        SpecError: if there is no such name.
    """
    if wanted is None:
        return usual
    if isinstance(wanted, str):
        return named_augmentation(wanted, preprocessing.input_size)
    return wanted

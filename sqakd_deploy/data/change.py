"""From a batch of stored images to what a model is given, on whatever device trains it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sqakd_deploy.data.augment import (
    crop_and_resize,
    random_boxes,
    resize_and_crop,
    shift_and_flip,
    twist_colours,
)
from sqakd_deploy.data.preprocessing import Augmentation, Preprocessing


@dataclass(frozen=True)
class Drawn:
    """Everything random that happens to N images.

    Attributes:
        offsets: corners for shifts, int64 ``(N, 2)``.
        flips: mirrored or not, bool ``(N,)``.
        boxes: crops, int64 ``(N, 4)``, or None.
        colours: factors of brightness, contrast and saturation, float32 ``(N, 3)``, or None.
    """

    offsets: Tensor
    flips: Tensor
    boxes: Tensor | None = None
    colours: Tensor | None = None

    @classmethod
    def draw(
        cls,
        count: int,
        size: tuple[int, int],
        augmentation: Augmentation,
        generator: torch.Generator,
    ) -> Drawn:
        """Draw for ``count`` images of a height and width (pixels).

        Newer kinds come last, so that runs begun without them can be resumed.
        """
        shift, area, colour = augmentation.shift, augmentation.area, augmentation.colour
        offsets = torch.randint(0, 2 * shift + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < (0.5 if augmentation.flip else 0.0)
        boxes = colours = None
        if area is not None:
            boxes = random_boxes(count, size, area, generator)
        if colour:
            colours = 1 + colour * (2 * torch.rand(count, 3, generator=generator) - 1)
        return cls(offsets, flips, boxes, colours)

    def at(self, which: slice) -> Drawn:
        """The part for some of the images."""
        boxes = None if self.boxes is None else self.boxes[which]
        colours = None if self.colours is None else self.colours[which]
        return Drawn(self.offsets[which], self.flips[which], boxes, colours)


class Change:
    """Crops, augments and normalises batches.

    Args:
        preprocessing: what the model wants.
        augmentation: what was drawn for.
        device: where to work.
    """

    def __init__(
        self, preprocessing: Preprocessing, augmentation: Augmentation, device: torch.device
    ) -> None:
        self.preprocessing, self.augmentation, self.device = preprocessing, augmentation, device
        self._normalise = _Normalise(preprocessing, device)
        mean = torch.tensor([round(255 * mean) for mean in preprocessing.mean], dtype=torch.uint8)
        self._fill = mean.to(device) if augmentation.fill == "mean" else None

    def __call__(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Float32 ``(B, C, H, W)`` from uint8 ``(B, C, H₀, W₀)`` and what was drawn for them."""
        images = images.to(self.device, non_blocking=True)
        images = self._placed(images, drawn)
        if drawn.colours is not None:
            images = twist_colours(images, drawn.colours.to(self.device))
        return self._normalise(images)

    def _placed(self, images: Tensor, drawn: Drawn) -> Tensor:
        size, resize = self.preprocessing.input_size, self.preprocessing.resize
        if drawn.boxes is not None:
            return crop_and_resize(images, drawn.boxes, drawn.flips, size)
        if resize is not None:
            images = resize_and_crop(images, resize, size)
        if not (self.augmentation.flip or self.augmentation.shift):
            return images
        offsets, flips = drawn.offsets.to(self.device), drawn.flips.to(self.device)
        return shift_and_flip(images, offsets, flips, self.augmentation.shift, self._fill)


class _Normalise:
    """:meth:`Preprocessing.apply` in torch, the same operations in the same order."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        # Tensors, since CUDA multiplies by the reciprocal of a Python number.
        self._full = torch.tensor(255.0, device=device)
        self._mean = torch.tensor(preprocessing.mean, device=device)[:, None, None]
        self._std = torch.tensor(preprocessing.std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(self._full).sub_(self._mean).div_(self._std)

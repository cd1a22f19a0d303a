"""Random changes to a batch of images, on whatever device holds it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

_ASPECT = math.log(4 / 3)  # widest and tallest crop
_TRIES = 10  # as torchvision draws a crop that has to fit
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
_MIDDLE = 127.5  # grey that contrast leaves as it is


def shift_and_flip(
    images: Tensor, offsets: Tensor, flips: Tensor, shift: int, fill: Tensor | None = None
) -> Tensor:
    """Pad by ``shift`` pixels, crop back to the size at each image's offset, and mirror.

    Args:
        images: uint8 ``(N, C, H, W)``.
        offsets: top and left corner of each crop, int64 ``(N, 2)`` in ``[0, 2·shift]``;
            ``shift`` is the middle and changes nothing.
        flips: which images to mirror left to right after the crop, bool ``(N,)``.
        shift: padding on every side (pixels).
        fill: colour of the padding, uint8 ``(C,)``; None is black.

    Returns:
        uint8 ``(N, C, H, W)``.
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = _padded(images, shift, fill)
    columns = torch.arange(width, device=device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]
    rows = torch.arange(height, device=device) + offsets[:, :1]
    # One gather does both; the index of each pixel in its padded channel is the same for all.
    index = (rows * padded.shape[3])[:, :, None] + columns[:, None, :]
    index = index.reshape(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(images.shape)


def _padded(images: Tensor, shift: int, fill: Tensor | None) -> Tensor:
    """Images with ``shift`` more pixels of one colour on every side."""
    if fill is None:
        return F.pad(images, (shift, shift, shift, shift))
    count, channels, height, width = images.shape
    padded = (
        fill[:, None, None].expand(count, channels, height + 2 * shift, width + 2 * shift).clone()
    )
    padded[:, :, shift : shift + height, shift : shift + width] = images
    return padded


def random_boxes(
    count: int, size: tuple[int, int], area: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Random crops: area uniform, logarithm of the aspect uniform in ±log 4/3, place uniform.

    What does not fit is drawn again, up to ten times; then the crop is the whole image
    (Szegedy et al., 2015, as implemented in torchvision).

    Args:
        count: N crops.
        size: height and width of the images (pixels).
        area: least and largest share of the image.
        generator: to draw from, on the CPU.

    Returns:
        Top, left, height and width in whole pixels, int64 ``(N, 4)``.
    """
    full = torch.tensor(size)
    sides = full.expand(count, 2).clone()
    fits = torch.zeros(count, dtype=torch.bool)
    for _ in range(_TRIES):
        share, aspect = torch.rand(2, count, generator=generator)
        pixels = (area[0] + share * (area[1] - area[0])) * size[0] * size[1]
        stretch = torch.exp((aspect * 2 - 1) * _ASPECT)
        tried = torch.stack([(pixels / stretch).sqrt(), (pixels * stretch).sqrt()], 1)
        tried = tried.round().long().clamp_(min=1)
        new = ~fits & (tried <= full).all(1)
        sides[new] = tried[new]
        fits |= new
    places = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([(places * (full - sides + 1)).long(), sides], 1)


def crop_and_resize(images: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a box out of each image, enlarge or reduce it to one size (bilinear), and mirror.

    One by one on the CPU, where torchvision's uint8 kernel is four times as fast as sampling a
    grid in float32; all at once elsewhere. The two differ in rounding, and where a box is reduced:
    only the first averages over the pixels that it drops.

    Args:
        images: uint8 ``(N, C, H, W)``.
        boxes: top, left, height and width (pixels), int64 ``(N, 4)``.
        flips: which images to mirror left to right after the crop, bool ``(N,)``.
        size: height and width of the result (pixels).

    Returns:
        uint8 ``(N, C, *size)``.
    """
    if images.device.type != "cpu":
        return sampled_crops(images, boxes.to(images.device), flips.to(images.device), size)
    out = images.new_empty((*images.shape[:2], *size))
    for image, box, flip, into in zip(images, boxes.tolist(), flips.tolist(), out, strict=True):
        # The kernel for interleaved channels is the faster one.
        crop = vision.crop_image(image, *box)[None].contiguous(memory_format=torch.channels_last)
        resized = vision.resize_image(crop, list(size), InterpolationMode.BILINEAR)[0]
        into.copy_(resized.flip(-1) if flip else resized)
    return out


def sampled_crops(images: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
    """:func:`crop_and_resize` of all images at once, on any device."""
    rows = _places(boxes[:, 0], boxes[:, 2], size[0], images.shape[2])
    columns = _places(boxes[:, 1], boxes[:, 3], size[1], images.shape[3])
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), -1)
    sampled = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return sampled.round_().to(torch.uint8)


def _places(start: Tensor, length: Tensor, count: int, full: int) -> Tensor:
    """Where along a side of ``full`` pixels to sample, ``(N, count)`` on ``grid_sample``'s ±1."""
    steps = (torch.arange(count, device=start.device) + 0.5) / count
    inside = (steps * length[:, None]).clamp(min=0.5)
    inside = torch.minimum(inside, length[:, None] - 0.5)  # nothing from outside of the box
    return (start[:, None] + inside) * (2 / full) - 1


def twist_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation by one affine map of each image's colours.

    ``y = b·(c·(s·x + (1 − s)·luma(x)) + (1 − c)·127.5)``, cut to 0 to 255 once, at the end.

    Args:
        images: ``(N, C, H, W)``, 0 to 255.
        factors: b, c and s of each, float32 ``(N, 3)``; 1 changes nothing.

    Returns:
        float32 ``(N, C, H, W)``; images of other than 3 channels have no saturation to change.
    """
    channels = images.shape[1]
    brightness, contrast, saturation = factors[:, :, None, None].unbind(1)
    matrix = torch.eye(channels, device=images.device)
    if channels == 3:
        luma = torch.tensor(_LUMA, device=images.device).expand(3, 3)
        matrix = saturation * matrix + (1 - saturation) * luma
    matrix = brightness * contrast * matrix
    offset = (brightness * (1 - contrast) * _MIDDLE).expand(-1, channels, 1)
    twisted = torch.baddbmm(offset, matrix.expand(len(images), -1, -1), images.float().flatten(2))
    return twisted.clamp_(0, 255).view(images.shape)


def resize_and_crop(images: Tensor, short: int, size: tuple[int, int]) -> Tensor:
    """Resize until the short side has so many pixels (bilinear), and cut out the middle.

    Args:
        images: uint8 ``(N, C, H, W)``.
        short: of the resized images (pixels).
        size: height and width of the result (pixels).

    Returns:
        uint8 ``(N, C, *size)``.
    """
    if min(images.shape[2:]) != short:
        images = vision.resize_image(images, [short], InterpolationMode.BILINEAR)
    return vision.center_crop_image(images, list(size))

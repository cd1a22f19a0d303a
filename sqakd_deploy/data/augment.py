"""Random changes to a batch of images, on whatever device holds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, shift: int) -> Tensor:
    """Pad by ``shift`` black pixels, crop back to the size at each image's offset, and mirror.

    Args:
        images: uint8 ``(N, C, H, W)``.
        offsets: top and left corner of each crop, int64 ``(N, 2)`` in ``[0, 2·shift]``;
            ``shift`` is the middle and changes nothing.
        flips: which images to mirror left to right after the crop, bool ``(N,)``.
        shift: padding on every side (pixels).

    Returns:
        uint8 ``(N, C, H, W)``.
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (shift, shift, shift, shift))
    columns = torch.arange(width, device=device)
    columns = torch.where(flips[:, None], columns.flip(0), columns) + offsets[:, 1:]
    rows = torch.arange(height, device=device) + offsets[:, :1]
    # One gather does both; the index of each pixel in its padded channel is the same for all.
    index = (rows * padded.shape[3])[:, :, None] + columns[:, None, :]
    index = index.reshape(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(images.shape)

"""The images that set ranges and BatchNorm: a few, in batches that BatchNorm can normalise by."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sqakd_deploy.data.splits import spread
from sqakd_deploy.given import images_in

_AT_ONCE = 512  # images of a tensor that are run together
_SINGLES = 32  # images that come one by one and are run together


def sample(images: Tensor | Iterable[object], count: int) -> Iterator[Tensor]:
    """At most ``count`` images, each once.

    Args:
        images: ``(N, C, H, W)``, of which evenly spread ones are taken (they may be sorted by
            class), or batches of them, of which the first are taken, as they come.
        count: of images.

    Returns:
        Batches; of a single image only if there is no other.
    """
    return _spread(images, count) if isinstance(images, Tensor) else _joined(_first(images, count))


def holding(batches: Iterator[Tensor], count: int) -> Iterator[Tensor] | None:
    """The same batches if they hold at least ``count`` images, else None; none is made twice."""
    ahead: list[Tensor] = []
    for batch in batches:
        ahead.append(batch)
        if sum(map(len, ahead)) >= count:
            return itertools.chain(ahead, batches)
    return None


def _spread(images: Tensor, count: int) -> Iterator[Tensor]:
    """Batches of about the same size, each of them evenly spread, too."""
    indices = torch.from_numpy(spread(len(images), count))
    parts = -(-len(indices) // _AT_ONCE)
    for part in range(parts):
        yield images[indices[part::parts]]


def _first(batches: Iterable[object], count: int) -> Iterator[Tensor]:
    for batch in batches:
        images = images_in(batch, None)[:count]
        count -= len(images)
        if len(images):
            yield images
        if not count:
            return


def _joined(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same images, single ones together: BatchNorm cannot normalise by one."""
    ready: list[Tensor] = []  # a batch that waits for a last single image, if there is one
    singles: list[Tensor] = []
    for batch in batches:
        singles.append(batch)
        if len(batch) == 1 and len(singles) < _SINGLES:
            continue
        yield from ready
        ready, singles = [_together(singles)], []
    if len(singles) > 1:
        yield from ready
        ready = []
    if ready or singles:
        yield _together([*ready, *singles])


def _together(batches: list[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches)

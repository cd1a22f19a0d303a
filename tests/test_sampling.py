from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sqakd_deploy.training.sampling import sample


def numbered(count: int) -> Tensor:
    """Images that say which they are."""
    return torch.arange(count).reshape(-1, 1, 1, 1).float()


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        ([16, 16, 16], 48, [16, 16, 16]),
        ([16, 16, 16], 40, [16, 16, 8]),
        ([16, 16, 16], 33, [16, 17]),
        ([16, 16, 1], 99, [16, 17]),
        ([16, 1, 16], 99, [16, 17]),
        ([16, 1, 1], 99, [16, 2]),
        ([1, 16], 99, [17]),
        ([1] * 70, 99, [32, 32, 6]),
        ([1] * 65, 99, [32, 33]),
        ([1] * 5, 3, [3]),
        ([0, 1, 0, 4], 99, [5]),
        ([1], 99, [1]),
        ([], 99, []),
    ],
)
def test_batches_stay_and_single_images_are_joined(
    sizes: list[int], count: int, wanted: list[int]
) -> None:
    images = numbered(sum(sizes))
    found = list(sample(images.split(sizes) if sizes else [], count))
    assert [len(batch) for batch in found] == wanted
    if found:
        assert torch.equal(torch.cat(found), images[:count])


def test_no_batch_is_made_that_is_not_needed() -> None:
    def batches() -> Iterator[tuple[Tensor, None]]:
        yield numbered(8), None
        raise AssertionError("a second batch was made")

    assert [len(batch) for batch in sample(batches(), 8)] == [8]


@pytest.mark.parametrize(
    ("images", "count", "sizes"), [(1000, 100, [100]), (3000, 513, [257, 256]), (40, 512, [40])]
)
def test_each_batch_of_a_sorted_tensor_holds_all_of_it(
    images: int, count: int, sizes: list[int]
) -> None:
    tensor = numbered(images)
    found = list(sample(tensor, count))
    assert [len(batch) for batch in found] == sizes
    apart = images / min(count, images)
    for batch in found:
        gaps = batch.flatten().diff()
        assert float(gaps.min()) > 0  # each image once
        assert float(gaps.max()) <= len(found) * (apart + 1)
        assert float(batch.min()) <= len(found) * apart
        assert float(batch.max()) >= images - 1 - 2 * len(found) * apart
    for batch, again in zip(found, sample(tensor, count), strict=True):
        assert torch.equal(batch, again)


def test_an_empty_tensor_has_no_batch() -> None:
    assert list(sample(numbered(0), 5)) == []

"""Batches of images."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqakd_deploy.data import Augmentation, Preprocessing
from sqakd_deploy.data.augment import shift_and_flip
from sqakd_deploy.data.batches import Batches, LabelledBatches, batch_bounds, mixed_seed
from sqakd_deploy.errors import DataError, SpecError

SIZE = (6, 5)
PLAIN = Preprocessing(channels=2, input_size=SIZE, mean=(0.3, 0.45), std=(0.21, 0.33))
MOVES = Augmentation(shift=2, flip=True)


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 2, *SIZE), dtype=np.uint8)


def _epoch(batches: Batches) -> torch.Tensor:
    return torch.cat(list(batches))


def test_batches_hold_exactly_what_preprocessing_says() -> None:
    images = _images(7)
    got = _epoch(Batches(images, PLAIN, 3, shuffle=False))
    np.testing.assert_array_equal(got.numpy(), PLAIN.apply(images))


def test_an_epoch_holds_every_image_once_in_a_new_order() -> None:
    batches = Batches(_images(50), PLAIN, 8, seed=3)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        orders.append(np.concatenate([indices for indices, _ in batches.indexed()]).tolist())

    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert list(range(50)) not in orders


def test_the_same_seed_gives_the_same_bits_whatever_else_is_drawn() -> None:
    first = Batches(_images(20), PLAIN, 6, seed=5, augmentation=MOVES)
    before = _epoch(first)
    torch.manual_seed(99)
    np.random.default_rng().random(3)
    second = Batches(_images(20), PLAIN, 6, seed=5, augmentation=MOVES)

    assert torch.equal(before, _epoch(second))
    assert torch.equal(before, _epoch(first))  # iterating does not advance the epoch
    second.set_epoch(1)
    assert not torch.equal(before, _epoch(second))
    assert not torch.equal(before, _epoch(Batches(_images(20), PLAIN, 6, seed=6)))


def test_batches_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    _epoch(Batches(_images(20), PLAIN, 6, augmentation=MOVES))
    assert torch.equal(before, torch.get_rng_state())


def test_the_batch_size_does_not_change_what_happens_to_an_image() -> None:
    small = Batches(_images(24), PLAIN, 4, seed=1, augmentation=MOVES)
    large = Batches(_images(24), PLAIN, 24, seed=1, augmentation=MOVES)
    assert torch.equal(_epoch(small), _epoch(large))


def test_labels_stay_with_their_images() -> None:
    images, labels = _images(30), np.arange(30)
    batches = Batches(images, PLAIN, 7, seed=2)

    labelled = LabelledBatches(batches, labels)

    assert len(labelled) == len(batches) == 5
    wanted = PLAIN.apply(images)
    for pictures, numbers in labelled:
        np.testing.assert_array_equal(pictures.numpy(), wanted[numbers.numpy()])


def test_as_many_labels_as_images() -> None:
    with pytest.raises(DataError, match=r"^wanted 4 labels, got 3$"):
        LabelledBatches(Batches(_images(4), PLAIN, 2), np.zeros(3, np.int64))


def test_memory_maps_are_read_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", _images(9))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    got = _epoch(Batches(mapped, PLAIN, 4, shuffle=False))
    np.testing.assert_array_equal(got.numpy(), PLAIN.apply(_images(9)))


@given(st.integers(1, 200), st.integers(1, 50), st.booleans())
def test_bounds(count: int, batch_size: int, drop_last: bool) -> None:
    bounds = batch_bounds(count, batch_size, drop_last=drop_last)
    sizes = [stop - start for start, stop in bounds]

    assert bounds[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert set(sizes[:-1]) <= {batch_size}
    if batch_size > 1 and count > 1:
        assert 1 not in sizes
    if drop_last:
        assert sum(sizes) == (count // batch_size * batch_size or count)
    else:
        assert sum(sizes) == count
        assert max(sizes) <= batch_size + 1


def test_length_is_the_number_of_batches() -> None:
    for drop_last in (False, True):
        batches = Batches(_images(21), PLAIN, 10, drop_last=drop_last)
        assert len(batches) == len(list(batches)) == 2


def test_one_image_is_enough_to_evaluate_but_not_to_train() -> None:
    assert _epoch(Batches(_images(1), PLAIN, 4, shuffle=False)).shape == (1, 2, *SIZE)
    with pytest.raises(DataError, match=r"^wanted at least 2 images, got 1$"):
        Batches(_images(1), PLAIN, 4)
    with pytest.raises(DataError, match=r"^wanted at least 1 images, got 0$"):
        Batches(_images(0), PLAIN, 4, shuffle=False)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SpecError, match=r"^batch size: wanted at least 1, got 0$"):
        Batches(_images(4), PLAIN, 0)
    with pytest.raises(DataError, match=r"^images: wanted uint8 of shape \(N, 2, 6, 5\)"):
        Batches(_images(4)[:, :1], PLAIN, 2)


def test_shift_and_flip_matches_a_loop() -> None:
    images = torch.from_numpy(_images(40))
    offsets = torch.randint(0, 5, (40, 2))
    flips = torch.rand(40) < 0.5

    got = shift_and_flip(images, offsets, flips, 2)

    height, width = SIZE
    for n in range(40):
        padded = np.pad(images[n].numpy(), ((0, 0), (2, 2), (2, 2)))
        top, left = offsets[n].tolist()
        wanted = padded[:, top : top + height, left : left + width]
        wanted = wanted[:, :, ::-1] if flips[n] else wanted
        np.testing.assert_array_equal(got[n].numpy(), wanted)


def test_the_mean_colour_moves_in() -> None:
    """It is 0 once normalised, to half a pixel's value; black is -mean/std."""
    norm = Preprocessing(channels=2, input_size=SIZE, mean=(0.3, 0.7), std=(0.2, 0.5))
    images = np.full((64, 2, *SIZE), 200, np.uint8)
    inside = (200 / 255 - np.array(norm.mean)) / np.array(norm.std)
    half = 0.5 / 255 / np.array(norm.std)
    for fill, border in (("mean", np.zeros(2)), ("black", -np.array(norm.mean) / norm.std)):
        augmentation = Augmentation(shift=2, fill=fill)  # type: ignore[arg-type]
        (batch,) = Batches(images, norm, 64, augmentation=augmentation)
        for channel in range(2):
            values = np.unique(batch[:, channel].numpy())
            assert len(values) == 2
            nearest = np.abs(values[:, None] - [border[channel], inside[channel]]).min(axis=1)
            assert nearest.max() <= half[channel]


def test_the_middle_offset_changes_nothing() -> None:
    images = torch.from_numpy(_images(4))
    unmoved = shift_and_flip(images, torch.full((4, 2), 3), torch.zeros(4, dtype=torch.bool), 3)
    assert torch.equal(unmoved, images)


def test_augmentation_reaches_every_offset_and_flips_half() -> None:
    # One lit pixel in the middle shows where each image was moved.
    images = np.zeros((600, 1, 7, 7), np.uint8)
    images[:, 0, 3, 2] = 255
    plain = Preprocessing(channels=1, input_size=(7, 7), mean=(0.0,), std=(1.0,))

    moved = _epoch(Batches(images, plain, 100, augmentation=Augmentation(shift=1)))
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (1, 2, 3)}

    flipped = _epoch(Batches(images, plain, 100, augmentation=Augmentation(flip=True)))
    mirrored = int((flipped[:, 0, 3, 4] > 0).sum())
    assert int((flipped[:, 0, 3, 2] > 0).sum()) == 600 - mirrored
    assert 240 < mirrored < 360  # 300 ± 5 standard deviations of a fair coin


def test_neighbouring_seeds_and_epochs_do_not_meet() -> None:
    seeds = {mixed_seed(seed, epoch) for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 400

"""Crops and colours, in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sqakd_deploy.data import Augmentation, Preprocessing
from sqakd_deploy.data.augment import (
    crop_and_resize,
    random_boxes,
    resize_and_crop,
    sampled_crops,
    twist_colours,
)
from sqakd_deploy.data.batches import Batches
from sqakd_deploy.data.decode import fit_image
from sqakd_deploy.data.preprocessing import chosen_augmentation, named_augmentation
from sqakd_deploy.errors import DataError, SpecError

ROUNDING = 1  # level: two kernels round .5 differently


def _smooth(count: int, height: int, width: int) -> torch.Tensor:
    """Images without edges, on which kernels differ by rounding alone."""
    rows = torch.linspace(0, 3, height)[:, None] + torch.arange(count)[:, None, None]
    columns = torch.linspace(0, 2, width)[None, :]
    planes = [torch.sin(rows + columns), torch.cos(rows - columns), torch.sin(rows * columns)]
    return (torch.stack(planes, 1) * 120 + 128).to(torch.uint8)


def _boxes(count: int, area: tuple[float, float], size: tuple[int, int] = (40, 50)) -> torch.Tensor:
    return random_boxes(count, size, area, torch.Generator().manual_seed(0))


def test_boxes_are_inside_and_of_the_wanted_area_and_aspect() -> None:
    boxes = _boxes(5000, (0.08, 1.0), (400, 400))
    top, left, height, width = boxes.double().unbind(1)

    assert (boxes >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (top + height <= 400).all()
    assert (left + width <= 400).all()
    share, aspect = height * width / 160_000, width / height
    assert 0.08 - 0.001 < float(share.min()) < 0.09
    assert float(share.max()) > 0.95
    whole = (height == 400) & (width == 400)  # stands for what did not fit in ten tries
    assert int(whole.sum()) < 5
    assert 0.745 < float(aspect[~whole].min()) < 0.76
    assert 1.31 < float(aspect[~whole].max()) < 1.34
    # On a square image as many are wide as tall: 0 ± 4 standard errors. Places reach both ends.
    assert abs(float(aspect.log().mean())) < 0.01
    assert float((top / (400 - height).clamp(min=1)).mean()) == pytest.approx(0.5, abs=0.02)
    assert (top == 400 - height).any()
    assert (left == 0).any()


def test_a_crop_that_never_fits_is_the_whole_image() -> None:
    boxes = _boxes(10, (1.0, 1.0), (10, 1000))
    assert boxes.tolist() == [[0, 0, 10, 1000]] * 10


def test_crops_are_those_of_pillow() -> None:
    images, boxes = _smooth(12, 40, 50), _boxes(12, (0.08, 1.0))
    flips = torch.arange(12) % 2 == 0

    got = crop_and_resize(images, boxes, flips, (48, 56))

    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        pixels = images[n, :, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        wanted = Image.fromarray(pixels).resize((56, 48), Image.Resampling.BILINEAR)
        wanted = np.asarray(wanted)[:, ::-1] if flips[n] else np.asarray(wanted)
        difference = got[n].permute(1, 2, 0).numpy().astype(int) - wanted
        assert np.abs(difference).max() <= ROUNDING


def test_the_way_of_other_devices_agrees_where_crops_are_enlarged() -> None:
    images, boxes = _smooth(30, 40, 50), _boxes(30, (0.08, 1.0))
    flips = torch.arange(30) % 3 == 0
    one_by_one = crop_and_resize(images, boxes, flips, (64, 80))
    at_once = sampled_crops(images, boxes, flips, (64, 80))
    assert int((one_by_one.int() - at_once.int()).abs().max()) <= ROUNDING


def test_a_crop_of_everything_at_the_same_size_changes_nothing() -> None:
    images = torch.randint(0, 256, (3, 2, 6, 7), dtype=torch.uint8)
    boxes, flips = torch.tensor([[0, 0, 6, 7]] * 3), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(crop_and_resize(images, boxes, flips, (6, 7)), images)
    assert torch.equal(sampled_crops(images, boxes, flips, (6, 7)), images)


def test_colours_follow_the_formula() -> None:
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    factors = 0.5 + torch.rand(5, 3)

    got = twist_colours(images, factors)

    for image, (b, c, s), result in zip(images.double(), factors.double(), got, strict=True):
        luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        wanted = b * (c * (s * image + (1 - s) * luma) + (1 - c) * 127.5)
        torch.testing.assert_close(result.double(), wanted.clamp(0, 255), atol=1e-3, rtol=0)


def test_factors_of_one_change_nothing() -> None:
    for channels in (1, 3, 4):
        images = torch.randint(0, 256, (3, channels, 4, 6), dtype=torch.uint8)
        same = twist_colours(images, torch.ones(3, 3))
        torch.testing.assert_close(same, images.float(), atol=1e-3, rtol=0)


def test_grey_has_brightness_and_contrast_only() -> None:
    images = torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)
    got = twist_colours(images, torch.tensor([[1.2, 0.8, 0.0]]))
    assert got[0, 0, 0, 0].item() == pytest.approx(1.2 * (0.8 * 100 + 0.2 * 127.5))


RESIZED = Preprocessing(
    channels=3, input_size=(28, 28), resize=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
)


def test_images_stored_at_the_resized_size_are_only_cropped() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    (batch,) = Batches(images, RESIZED, 3, shuffle=False)
    np.testing.assert_array_equal(batch.numpy(), RESIZED.apply(images[:, :, 2:30, 2:30]))


def test_others_are_resized_first() -> None:
    images = _smooth(3, 16, 16)
    got = resize_and_crop(images, 32, (28, 28))
    for image, result in zip(images, got, strict=True):
        large = Image.fromarray(image.permute(1, 2, 0).numpy())
        wanted = fit_image(large.resize((32, 32), Image.Resampling.BILINEAR), 3, (32, 32))
        assert np.abs(result.numpy().astype(int) - wanted[:, 2:30, 2:30]).max() <= ROUNDING


def test_a_batch_is_the_same_whatever_its_size_and_ends_at_the_input_size() -> None:
    images = _smooth(24, 16, 16).numpy()
    augmentation = named_augmentation("imagenet", (28, 28))
    how = {"seed": 1, "augmentation": augmentation}
    small = torch.cat(list(Batches(images, RESIZED, 4, **how)))  # type: ignore[arg-type]
    large = torch.cat(list(Batches(images, RESIZED, 24, **how)))  # type: ignore[arg-type]
    other = torch.cat(list(Batches(images, RESIZED, 24, seed=2, augmentation=augmentation)))

    assert small.shape == (24, 3, 28, 28)
    assert torch.equal(small, large)
    assert not torch.equal(large, other)


def test_an_older_run_draws_what_it_drew() -> None:
    """Orders, shifts and flips do not depend on whether there are crops and colours after them."""
    images = _smooth(20, 8, 8).numpy()
    plain = RESIZED.changed(input_size=(8, 8)).model_copy(update={"resize": None})
    with_colour = Batches(images, plain, 20, augmentation=Augmentation(shift=1, colour=1e-7))
    without = Batches(images, plain, 20, augmentation=Augmentation(shift=1))
    torch.testing.assert_close(next(iter(with_colour)), next(iter(without)), atol=1e-4, rtol=0)


def test_the_named_augmentations() -> None:
    assert named_augmentation("none", (32, 32)) == Augmentation()
    assert named_augmentation("cifar", (32, 32)) == Augmentation(shift=4, fill="mean", flip=True)
    assert named_augmentation("imagenet", (224, 224)) == Augmentation(
        area=(0.08, 1.0), flip=True, colour=0.2
    )
    usual = Augmentation(shift=1)
    assert chosen_augmentation(None, usual, RESIZED) is usual
    assert chosen_augmentation("none", usual, RESIZED) == Augmentation()
    assert chosen_augmentation(Augmentation(flip=True), usual, RESIZED) == Augmentation(flip=True)
    with pytest.raises(SpecError, match=r"^unknown augmentation 'cifer'. Did you mean 'cifar'\?"):
        named_augmentation("cifer", (32, 32))


def test_augmentations_that_contradict_are_refused() -> None:
    with pytest.raises(SpecError, match=r"^area: wanted the smaller share first, got \(1.0, 0.5\)"):
        Augmentation(area=(1.0, 0.5))
    with pytest.raises(SpecError, match=r"shift and area are two ways to crop; give one$"):
        Augmentation(area=(0.1, 0.5), shift=2)


def test_a_resize_below_the_input_is_refused() -> None:
    values = {"channels": 1, "input_size": (8, 10), "mean": (0.5,), "std": (0.5,), "resize": 7}
    with pytest.raises(SpecError, match=r"^resize: wanted at least 8, the short side .* got 7$"):
        Preprocessing.parse(values)


def test_the_resize_keeps_its_ratio() -> None:
    photos = RESIZED.changed(input_size=(224, 448))
    assert (photos.resize, photos.stored_size) == (256, (256, 512))
    assert RESIZED.changed(mean=(0.5,)).mean == (0.5, 0.5, 0.5)


def test_stored_images_of_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match=r"^images: wanted uint8 of shape \(N, 3, 28, 28\)"):
        Batches(np.zeros((2, 1, 16, 16), np.uint8), RESIZED, 2)

"""Images from memory, from the cache and from workers are the same batches."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sqakd_deploy.data import Augmentation, ImageData, load_data, storage
from sqakd_deploy.data.batches import Batches, LabelledBatches
from sqakd_deploy.data.gather import Gather
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.options import Keeping
from sqakd_deploy.data.preprocessing import named_augmentation
from sqakd_deploy.errors import DataError

SIZE = (12, 10)
TINY = 1e-9  # GiB
EVERYTHING = Augmentation(area=(0.2, 1.0), flip=True, colour=0.3)

# A test's process has threads by then; the workers touch nothing that those hold.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (44, *SIZE, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.jpg")
    return tmp_path / "photos"


def _from_memory(photos: Path) -> ImageData:
    return load_data(photos, keeping=Keeping(cache=False))


def _from_cache(photos: Path) -> ImageData:
    load_data(photos)
    return load_data(photos)


def _from_files(photos: Path) -> ImageData:
    return load_data(photos, keeping=Keeping(max_cache_gb=TINY, workers=0))


def _from_workers(photos: Path) -> ImageData:
    return load_data(photos, keeping=Keeping(max_cache_gb=TINY, workers=2))


def _batches(data: ImageData, augmentation: Augmentation, shard: tuple[int, int]) -> Batches:
    return Batches(
        data.train.images,
        data.preprocessing,
        8,
        seed=3,
        augmentation=augmentation,
        drop_last=True,
        shard=shard,
    )


def _epochs(batches: Batches) -> Iterator[torch.Tensor]:
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        yield from batches


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
@pytest.mark.parametrize("augmentation", [Augmentation(shift=2, flip=True), EVERYTHING])
@pytest.mark.parametrize("other", [_from_cache, _from_files, _from_workers])
def test_the_same_batches_bit_for_bit(
    photos: Path, other: object, augmentation: Augmentation, shard: tuple[int, int]
) -> None:
    assert callable(other)
    memory, kept = _from_memory(photos), other(photos)

    wanted = list(_epochs(_batches(memory, augmentation, shard)))
    got = list(_epochs(_batches(kept, augmentation, shard)))

    assert len(got) == len(wanted) == 10
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(wanted[0], wanted[5])
    assert memory.classes == kept.classes
    assert memory.train.need_labels().tolist() == kept.train.need_labels().tolist()
    assert memory.augmentation == kept.augmentation


@pytest.mark.parametrize("read", [_from_cache, _from_workers])
def test_a_resumed_epoch_goes_on_where_it_stopped(photos: Path, read: object) -> None:
    assert callable(read)
    data = read(photos)
    batches = LabelledBatches(_batches(data, EVERYTHING, (0, 1)), data.train.need_labels())
    batches.set_epoch(4)
    whole = list(batches)

    rest = list(batches.starting_at(3))

    assert len(rest) == len(whole) - 3
    for (a, labels_a), (b, labels_b) in zip(rest, whole[3:], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels_a, labels_b)


def test_what_is_skipped_is_not_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _from_files(photos)
    decode, seen = ImageFiles.__getitem__, []

    def counted(self: ImageFiles, key: object) -> object:
        seen.append(key)
        return decode(self, key)

    monkeypatch.setattr(ImageFiles, "__getitem__", counted)
    list(_batches(data, Augmentation(), (0, 1)).starting_at(3))
    assert [len(np.asarray(key)) for key in seen] == [8, 8]


def test_two_iterations_at_once_and_one_broken_off(photos: Path) -> None:
    batches = _batches(_from_workers(photos), Augmentation(), (0, 1))
    wanted = list(batches)
    for pair in zip(batches, batches, strict=True):
        assert torch.equal(*pair)
    first = next(iter(batches))  # as a training looks at an example
    assert torch.equal(first, wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(batches, wanted, strict=True))


def test_workers_leave_the_global_generator_alone(photos: Path) -> None:
    batches = _batches(_from_workers(photos), EVERYTHING, (0, 1))
    before = torch.get_rng_state()
    list(batches)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("read", [_from_files, _from_workers])
def test_a_bad_file_is_named_when_it_is_met(photos: Path, read: object) -> None:
    assert callable(read)
    bad = photos / "a" / "004.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    data = read(photos)
    with pytest.raises(DataError) as caught:
        list(_batches(data, Augmentation(), (0, 1)))
    assert str(caught.value).startswith(f"cannot read image {bad}: ")
    assert "Traceback" not in str(caught.value)


def test_bad_files_are_found_once_and_skipped_alike(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = photos / "a" / "004.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    memory = load_data(photos, skip_bad_images=True, keeping=Keeping(cache=False))
    keeping, messages = Keeping(max_cache_gb=TINY, workers=0), []
    first = load_data(photos, skip_bad_images=True, keeping=keeping, message=messages.append)
    assert "every image is decoded once to find those that cannot be" in messages

    def refuse(*args: object) -> list[int]:
        raise AssertionError("searched again")

    monkeypatch.setattr(storage, "_search", refuse)
    second = load_data(photos, skip_bad_images=True, keeping=keeping)

    for data in (first, second):
        assert data.skipped == memory.skipped == (str(bad),)
        assert len(data.train) == len(memory.train)
        everything = np.arange(len(data.train))
        np.testing.assert_array_equal(data.train.images[everything], memory.train.images)


def test_a_folder_of_bad_files_is_refused_by_workers_too(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_text("no")
    keeping = Keeping(max_cache_gb=TINY)
    with pytest.raises(DataError, match=r"^none of the 3 images in .* can be read$"):
        load_data(tmp_path, skip_bad_images=True, keeping=keeping)


def test_it_is_said_that_workers_decode(photos: Path) -> None:
    messages: list[str] = []
    keeping = Keeping(max_cache_gb=TINY, workers=3)
    load_data(photos, keeping=keeping, message=messages.append)
    assert messages[:1] == [
        "1.48e-05 GiB of decoded images are more than max_cache_gb = 1e-09: "
        "3 worker processes decode them in every epoch"
    ]


class _Deadly(ImageFiles):
    def __getitem__(self, key: object) -> object:
        os.kill(os.getpid(), signal.SIGKILL)
        return None


# torch's handler of SIGCHLD may raise once more while the loader is taken down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_explained(photos: Path) -> None:
    files = _Deadly(photos, sorted(photos.rglob("*.jpg")), 3, SIZE, workers=1)
    with pytest.raises(DataError, match=r"a process that reads images ended .*--workers 0$"):
        list(Gather(files)([np.arange(4)]))


class _Interrupted(ImageFiles):
    def __getitem__(self, key: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)  # as a terminal does, to every process of a group
        return super().__getitem__(key)


def test_workers_leave_it_to_the_training_to_stop(photos: Path) -> None:
    files = _Interrupted(photos, sorted(photos.rglob("*.jpg")), 3, SIZE, workers=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which workers are born with
    try:
        batches = list(Gather(files)([np.arange(4), np.arange(4, 8)]))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [len(batch) for batch in batches] == [4, 4]


def test_image_files_look_like_an_array(photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    files = ImageFiles(photos, paths, 1, (5, 4))

    assert (files.shape, files.ndim, files.dtype) == ((44, 1, 5, 4), 4, np.uint8)
    assert files.nbytes == 44 * 20
    assert files.paths == paths
    assert files[0].shape == (1, 5, 4)
    assert files[np.array([3, 1])].shape == (2, 1, 5, 4)
    assert isinstance(files[2:5], ImageFiles)
    assert files[2:5].paths == paths[2:5]
    np.testing.assert_array_equal(files[2:5][np.array([1])], files[np.array([3])])
    assert pickle.loads(pickle.dumps(files)).paths == paths  # noqa: S301 - as spawned workers do


def test_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    names = ["ä ö.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("L", (4, 5), 9).save(tmp_path / name)
    files = ImageFiles(tmp_path, [tmp_path / name for name in names], 1, (5, 4))
    assert files[np.arange(2)].tolist() == np.full((2, 1, 5, 4), 9).tolist()


def test_named_augmentations_on_files(photos: Path) -> None:
    data = load_data(photos, augmentation="imagenet", keeping=Keeping(max_cache_gb=TINY, workers=0))
    assert data.augmentation == named_augmentation("imagenet", SIZE)

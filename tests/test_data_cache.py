"""The memory-mapped cache of decoded images."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image

from sqakd_deploy.data import cache as cache_module
from sqakd_deploy.data import load_data, storage
from sqakd_deploy.data.cache import Cache, DamagedError, cached
from sqakd_deploy.data.image_files import ImageFiles
from sqakd_deploy.data.options import Keeping
from sqakd_deploy.errors import DataError, SpecError

SIZE = (9, 8)


def _write(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03d}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    _write(tmp_path / "photos", 20)
    return tmp_path / "photos"


@pytest.fixture
def place() -> Path:
    folder = Path(os.environ["SQAKD_CACHE"])
    folder.mkdir()
    return folder


def _files(folder: Path) -> ImageFiles:
    return ImageFiles(folder, sorted(folder.iterdir()), 3, SIZE)


def _forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decoded although there is a cache")

    monkeypatch.setattr(cache_module, "decode_chunks", refuse)
    monkeypatch.setattr(storage, "decode_files", refuse)


def _kinds(place: Path) -> list[str]:
    return sorted(path.suffix for path in place.iterdir())


def test_the_second_start_decodes_nothing(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_data(photos)
    assert _kinds(place) == [".json", ".u8"]
    _forbid_decoding(monkeypatch)
    second = load_data(photos)

    for a, b in ((first.train, second.train), (first.test, second.test)):
        np.testing.assert_array_equal(a.images, b.images)
    plain = load_data(photos, keeping=Keeping(max_cache_gb=0)).train.images
    np.testing.assert_array_equal(second.train.images, plain[np.arange(len(plain))])


def test_without_a_cache_nothing_is_written(photos: Path, place: Path) -> None:
    kept = load_data(photos, keeping=Keeping(cache=False)).train.images
    assert list(place.iterdir()) == []
    np.testing.assert_array_equal(kept, load_data(photos).train.images)


def _add(photos: Path) -> None:
    (photos / "new.png").write_bytes((photos / "003.png").read_bytes())


def _remove(photos: Path) -> None:
    (photos / "003.png").unlink()


def _change(photos: Path) -> None:
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(photos / "003.png")


def _touch(photos: Path) -> None:
    os.utime(photos / "003.png", ns=(1, 1))


def _rename(photos: Path) -> None:
    (photos / "003.png").rename(photos / "zzz.png")


@pytest.mark.parametrize("alter", [_add, _remove, _change, _touch, _rename])
def test_a_changed_folder_is_decoded_again_and_its_old_cache_removed(
    photos: Path, place: Path, alter: Any
) -> None:
    mapped = load_data(photos).train.images
    before, old = mapped.copy(), set(place.iterdir())
    alter(photos)

    now = load_data(photos).train.images

    wanted = load_data(photos, keeping=Keeping(cache=False)).train.images
    np.testing.assert_array_equal(now, wanted)
    assert _kinds(place) == [".json", ".u8"]
    assert not old & set(place.iterdir())
    np.testing.assert_array_equal(mapped, before)  # another run may still hold the old one


def test_caches_of_other_sizes_folders_and_limits_live_beside_each_other(
    photos: Path, place: Path
) -> None:
    _write(photos.parent / "others", 3)
    load_data(photos)
    load_data(photos, input_size=(4, 4))
    load_data(photos, channels=1)
    load_data(photos, limit=2)
    load_data(photos.parent / "others")
    assert _kinds(place) == [".json"] * 5 + [".u8"] * 5


def _truncate(cache: Cache) -> None:
    os.truncate(cache.data, cache.data.stat().st_size - 1)


def _empty(cache: Cache) -> None:
    os.truncate(cache.data, 0)


def _flip_a_bit(cache: Cache) -> None:
    content = bytearray(cache.data.read_bytes())
    content[len(content) // 2] ^= 1
    cache.data.write_bytes(content)


def _cut_description(cache: Cache) -> None:
    cache.facts.write_bytes(cache.facts.read_bytes()[:-2])


def _other_description(cache: Cache) -> None:
    facts = json.loads(cache.facts.read_text())
    cache.facts.write_text(json.dumps(facts | {"bad": [99]}))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (_truncate, "wanted 4320 bytes, found 4319"),
        (_empty, "wanted 4320 bytes, found 0"),
        (_flip_a_bit, "its checksum is wrong"),
        (_cut_description, "its description cannot be read"),
        (_other_description, "its description cannot be read"),
    ],
)
def test_a_damaged_cache_is_rebuilt_and_said_so(
    photos: Path, place: Path, damage: Any, what: str
) -> None:
    files = _files(photos)
    cache = Cache.of(files, place)
    wanted = cached(cache, files).images[:].copy()
    damage(cache)
    messages: list[str] = []

    again = cached(cache, files, message=messages.append)

    np.testing.assert_array_equal(again.images, wanted)
    assert len(messages) == 1
    assert f"the cache {cache.data} is damaged: {what}" in messages[0]
    assert messages[0].endswith("decoding the images again")
    cached(cache, files, message=messages.append)
    assert len(messages) == 1


def test_large_caches_are_checked_at_spread_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_BLOCK", 10)
    monkeypatch.setattr(cache_module, "_MOST_BLOCKS", 3)
    data = np.zeros(95, np.uint8)  # blocks 0, 4 and 9 of ten are summed
    clean = cache_module._checksum(data, [])
    for place, seen in ((0, True), (9, True), (15, False), (45, True), (94, True), (70, False)):
        data[place] = 1
        assert (cache_module._checksum(data, []) != clean) is seen, place
        data[place] = 0
    assert cache_module._checksum(data, [1]) != clean


def test_bad_files_are_part_of_the_cache(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = photos / "004.png"
    bad.write_bytes(b"no picture")
    first = load_data(photos, skip_bad_images=True)
    with pytest.raises(DataError, match=r"^cannot read image .*004\.png"):
        load_data(photos)
    _forbid_decoding(monkeypatch)
    second = load_data(photos, skip_bad_images=True)

    assert first.skipped == second.skipped == (str(bad),)
    assert len(second.train) == 17
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert _kinds(place) == [".json", ".u8"]


_BUILD = """
import sys
from sqakd_deploy.data import load_data
data = load_data(sys.argv[1], keeping=None, message=print, mean=(0.5,), std=(0.5,))
print(int(data.train.images.sum()))
"""


def test_two_runs_may_build_at_once(photos: Path, place: Path) -> None:
    command = [sys.executable, "-c", _BUILD, str(photos)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=60)[0].strip() for run in runs]

    wanted = load_data(photos, keeping=Keeping(cache=False)).train.images.sum()
    assert said == [str(wanted)] * 2
    assert _kinds(place) == [".json", ".u8"]
    assert load_data(photos).train.images.sum() == wanted


def test_a_builder_overtaken_by_another_ends_with_the_same_cache(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _files(photos)
    cache = Cache.of(files, place)
    describe, winner = Cache._describe, []

    def overtaken(self: Cache, temporary: Path, facts: dict[str, Any]) -> None:
        monkeypatch.setattr(Cache, "_describe", describe)
        winner.append(cache.build(files).images)  # between the loser's two renamings
        describe(self, temporary, facts)

    monkeypatch.setattr(Cache, "_describe", overtaken)
    loser = cache.build(files).images

    np.testing.assert_array_equal(winner[0], loser)
    assert cache.open(files) is not None
    assert _kinds(place) == [".json", ".u8"]


_HANG = """
import sys, time
import sqakd_deploy.data.cache as cache
from sqakd_deploy.data import load_data

def hang(file):
    file.flush()
    print("half-way", flush=True)
    time.sleep(600)

cache._settle = hang
load_data(sys.argv[1])
"""


def test_what_a_killed_builder_leaves_is_no_cache_and_goes_later(photos: Path, place: Path) -> None:
    command = [sys.executable, "-c", _HANG, str(photos)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "half-way\n"
        run.send_signal(signal.SIGKILL)
    (left,) = place.iterdir()
    assert left.suffix == ".tmp"

    first = load_data(photos)
    assert left.exists()  # for all anybody knows, its builder is at work
    np.testing.assert_array_equal(
        first.train.images, load_data(photos, keeping=Keeping(cache=False)).train.images
    )
    os.utime(left, (time.time() - 7200,) * 2)
    load_data(photos, channels=1)
    assert not left.exists()


def _full(file: BinaryIO) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_memory_is_used(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_settle", _full)
    messages: list[str] = []

    data = load_data(photos, message=messages.append)

    assert messages[:1] == [
        f"the cache folder {place} cannot be used ([Errno 28] No space left on device); "
        "the images are kept in memory"
    ]
    assert list(place.iterdir()) == []
    wanted = load_data(photos, keeping=Keeping(cache=False)).train.images
    np.testing.assert_array_equal(data.train.images, wanted)


def test_a_disk_seen_to_be_too_small_is_left_alone(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    messages: list[str] = []
    load_data(photos, message=messages.append)
    assert "GiB are wanted, 9.31e-07 GiB are free); the images are kept in memory" in messages[0]
    assert list(place.iterdir()) == []


def test_what_fits_neither_disk_nor_memory_is_decoded_by_workers(
    photos: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_settle", _full)
    monkeypatch.setattr(storage, "_MEMORY", 100)
    messages: list[str] = []

    data = load_data(photos, keeping=Keeping(workers=0), message=messages.append)

    assert isinstance(data.train.images, ImageFiles)
    assert "too much for memory, and the cache folder" in messages[0]
    assert messages[0].endswith("no worker processes decode them in every epoch")


def test_a_folder_that_cannot_be_made_is_said(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    messages: list[str] = []
    load_data(photos, keeping=Keeping(tmp_path / "file" / "cache"), message=messages.append)
    assert "cannot be used ([Errno 20] Not a directory" in messages[0]


def test_a_file_that_goes_meanwhile_is_named(photos: Path, place: Path) -> None:
    files = _files(photos)
    (photos / "007.png").unlink()
    missing = r"^cannot read image .*007\.png: .*No such file or directory"
    with pytest.raises(DataError, match=missing):
        cached(Cache.of(files, place), files)


@pytest.mark.parametrize(
    "keeping", [Keeping(), Keeping(cache=False), Keeping(max_cache_gb=1e-9, workers=0)]
)
def test_a_link_to_nothing_is_a_bad_file_wherever_images_are_kept(
    photos: Path, keeping: Keeping
) -> None:
    link = photos / "link.png"
    link.symlink_to(photos / "gone.png")
    for _ in range(2):
        data = load_data(photos, skip_bad_images=True, keeping=keeping)
        assert data.skipped == (str(link),)
        assert len(data.train) + len(data.test) == 20
    link.unlink()
    link.symlink_to(photos / "000.png")
    again = load_data(photos, skip_bad_images=True, keeping=keeping)
    assert not again.skipped
    assert len(again.train) + len(again.test) == 21


def test_an_absent_cache_is_no_damage(photos: Path, place: Path) -> None:
    files = _files(photos)
    cache = Cache.of(files, place)
    assert cache.open(files) is None
    cache.build(files)
    _flip_a_bit(cache)
    with pytest.raises(DamagedError, match=r"^its checksum is wrong$"):
        cache.open(files)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_cache_gb": -1.0}, r"^max_cache_gb: wanted at least 0, got -1.0$"),
        ({"workers": -1}, r"^workers: wanted at least 0, got -1$"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Keeping(**wrong)

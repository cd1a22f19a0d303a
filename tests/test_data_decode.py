"""Image files of all kinds."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sqakd_deploy.data.decode import decode_file, decode_files, fit_image, fit_images
from sqakd_deploy.errors import DataError

GRADIENT = np.arange(8 * 6, dtype=np.uint8).reshape(8, 6) * 5


def _save(path: Path, pixels: np.ndarray = GRADIENT) -> Path:
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".pgm", ".tif", ".tiff", ".gif"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    path = _save(tmp_path / f"image{suffix}")
    np.testing.assert_array_equal(decode_file(path, 1, (8, 6)), GRADIENT[None])


def test_colour_is_rgb_and_channels_come_first(tmp_path: Path) -> None:
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 200, 7
    got = decode_file(_save(tmp_path / "red.png", pixels), 3, (4, 5))

    assert got.shape == (3, 4, 5)
    assert [int(channel.max()) for channel in got] == [200, 0, 7]


@pytest.mark.parametrize(("suffix", "mode"), [(".jpg", "RGB"), (".jpeg", "L"), (".webp", "RGB")])
def test_lossy_formats_are_close(tmp_path: Path, suffix: str, mode: str) -> None:
    smooth = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    path = tmp_path / f"image{suffix}"
    Image.fromarray(smooth).convert(mode).save(path, quality=95)

    got = decode_file(path, 1, (32, 32)).astype(int)

    assert np.abs(got - smooth).mean() < 3  # compression; a wrong layout is off by dozens


def test_sixteen_bit_pixels_are_scaled_and_not_saturated(tmp_path: Path) -> None:
    deep = GRADIENT.astype(np.uint16) * 257
    got = decode_file(_save(tmp_path / "deep.png", deep), 1, (8, 6))
    np.testing.assert_array_equal(got, GRADIENT[None])


def test_a_palette_with_transparency_raises_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(GRADIENT).convert("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    got = decode_file(tmp_path / "palette.png", 3, (8, 6))
    np.testing.assert_array_equal(got[0], GRADIENT)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "float.tif", GRADIENT.astype(np.float32))
    with pytest.raises(DataError, match=r"pixels are floating-point numbers without a known range"):
        decode_file(path, 1, (8, 6))


def test_photographs_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    Image.fromarray(GRADIENT).save(tmp_path / "turned.png", exif=exif)
    got = decode_file(tmp_path / "turned.png", 1, (6, 8))
    np.testing.assert_array_equal(got[0], np.rot90(GRADIENT, -1))


def test_other_aspects_are_cropped_about_the_centre() -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    got = fit_image(Image.fromarray(wide), 1, (4, 4))
    np.testing.assert_array_equal(got, np.full((1, 4, 4), 200))


def test_resizing_averages() -> None:
    checks = np.indices((8, 8)).sum(0) % 2 * np.uint8(200)
    got = fit_image(Image.fromarray(checks.astype(np.uint8)), 1, (2, 2))
    # Antialiased: near the mean of 100, where picking single pixels would give 0 or 200.
    np.testing.assert_allclose(got, 100, atol=10)


def test_large_jpegs_come_out_as_without_the_shortcut(tmp_path: Path) -> None:
    rows, columns = np.indices((600, 800))
    photo = np.stack([rows % 256, columns % 256, (rows + columns) // 6], -1).astype(np.uint8)
    photo = np.asarray(Image.fromarray(photo).resize((800, 600)))
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path, quality=95)
    with Image.open(path) as image:
        whole = fit_image(image, 3, (60, 80)).astype(int)

    got = decode_file(path, 3, (60, 80)).astype(int)

    assert np.abs(got - whole).mean() < 3  # decoding at half or a quarter of the size


def test_arrays_are_fitted_as_files_are() -> None:
    images = np.stack([GRADIENT, GRADIENT[::-1]])[:, None]
    assert fit_images(images, 1, (8, 6)) is images
    got = fit_images(images, 3, (4, 4))
    np.testing.assert_array_equal(got[1], fit_image(Image.fromarray(images[1, 0]), 3, (4, 4)))


@pytest.mark.parametrize("keep", [0, 10, 60, -200])
def test_damaged_files_are_named(tmp_path: Path, keep: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        path = _save(tmp_path / name, noise)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(DataError) as caught:
            decode_file(path, 3, (32, 32))
        assert str(caught.value).startswith(f"cannot read image {path}: ")
        assert str(caught.value).endswith("or skip such files with --skip-bad-images")


def test_a_header_of_another_type_is_damage(tmp_path: Path) -> None:
    path = _save(tmp_path / "offset.tif", GRADIENT)
    content = bytearray(path.read_bytes())
    entry = content.index(struct.pack("<HH", 273, 4))  # where the pixels are, as an integer
    struct.pack_into("<H", content, entry + 2, 5)  # as a fraction
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^cannot read image .*offset\.tif: "):
        decode_file(path, 1, (8, 6))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^cannot read image .*gone\.png: "):
        decode_file(tmp_path / "gone.png", 3, (8, 8))


def test_many_files_keep_their_order_and_report_progress(tmp_path: Path) -> None:
    paths = [_save(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8)) for i in range(150)]
    seen: list[tuple[int, int]] = []

    decoded = decode_files(
        paths, 1, (4, 4), progress=lambda done, total: seen.append((done, total))
    )

    assert decoded.images[:, 0, 0, 0].tolist() == list(range(150))
    assert decoded.good.all()
    assert seen[-1] == (150, 150)
    assert seen == sorted(seen)


def test_large_files_are_decoded_in_threads_alike(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (70, 80, 80, 3), dtype=np.uint8)
    paths = [_save(tmp_path / f"{i}.bmp", image) for i, image in enumerate(noise)]

    decoded = decode_files(paths, 3, (80, 80))

    np.testing.assert_array_equal(decoded.images, noise.transpose(0, 3, 1, 2))


def test_the_first_bad_file_stops_or_is_left_out(tmp_path: Path) -> None:
    paths = [_save(tmp_path / f"{i}.png", np.full((4, 4), i, np.uint8)) for i in range(5)]
    for index in (1, 3):
        paths[index].write_text("no image")

    with pytest.raises(DataError, match=r"^cannot read image .*1\.png: cannot identify"):
        decode_files(paths, 1, (4, 4))
    decoded = decode_files(paths, 1, (4, 4), skip_bad=True)

    assert decoded.images[:, 0, 0, 0].tolist() == [0, 2, 4]
    assert decoded.good.tolist() == [True, False, True, False, True]
    assert decoded.bad == (paths[1], paths[3])

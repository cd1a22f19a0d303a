"""Classify images with an exported file: onnxruntime, numpy and Pillow, nothing else.

The file itself says how images are prepared and what its classes are called.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def fitted(image: Image.Image, facts: dict[str, Any]) -> Image.Image:
    """An image in the colours and the size that the file wants, as its student saw them.

    The middle is cut out in the wanted aspect and resized; with ``resize`` in the metadata, to a
    short side of that, of which the middle is cut out.
    """
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers without a known range")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would saturate
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    image = image.convert("L" if facts["channels"] == 1 else "RGB")
    height, width = facts["input_size"]
    ratio = (facts["resize"] or min(height, width)) / min(height, width)
    size = round(width * ratio), round(height * ratio)
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.crop((left, top, left + width, top + height))


def prepared(image: Image.Image, facts: dict[str, Any], source: dict[str, Any]) -> np.ndarray:
    """A batch of one image as the file's input: raw pixels, or normalised floats."""
    pixels = np.asarray(fitted(image, facts), np.uint8)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if source["type"] == "float32":
        mean, std = (np.array(facts[key], np.float32) for key in ("mean", "std"))
        pixels = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    batch = pixels[None] if source["layout"] == "NHWC" else pixels.transpose(2, 0, 1)[None]
    return np.ascontiguousarray(np.repeat(batch, source["batch"] or 1, axis=0))


def has_vnni() -> bool:
    """Whether the CPU is known to sum products of 8 bits exactly; known on Linux alone."""
    try:
        return "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def classify(model: Path, image: Path, top: int) -> list[tuple[str, float]]:
    """The likeliest classes of an image and their probabilities, best first."""
    options = ort.SessionOptions()
    if not has_vnni():
        # Else sums of 8-bit layers saturate. Where the CPU has AVX512-VNNI it costs time.
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no base of their own
        sys.exit(f"error: {model} cannot be read as a model: {' '.join(str(error).split())}")
    metadata = session.get_modelmeta().custom_metadata_map
    if not {"sqakd.preprocessing", "sqakd.input"} <= metadata.keys():
        sys.exit(f"error: {model} does not say how its images are prepared; export it from a run")
    facts, source = (json.loads(metadata[f"sqakd.{k}"]) for k in ("preprocessing", "input"))
    try:
        with Image.open(image) as opened:
            batch = prepared(opened, facts, source)
    except OSError as error:
        sys.exit(f"error: {image} cannot be read as an image: {error}")
    logits = session.run(None, {source["name"]: batch})[0][0].astype(np.float64)
    odds = np.exp(logits - logits.max())
    names = json.loads(metadata.get("sqakd.classes", "null")) or list(map(str, range(len(odds))))
    best = np.argsort(-logits, kind="stable")[:top]
    return [(names[k], float(odds[k] / odds.sum())) for k in best]


def main() -> None:
    """Parse the command line, classify and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="file that `sqakd-deploy export` wrote")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=5, help="classes to print (default 5)")
    arguments = parser.parse_args()
    for image in arguments.images:
        print(image)
        for name, share in classify(arguments.model, image, arguments.top):
            print(f"  {100 * share:6.2f} %  {name}")


if __name__ == "__main__":
    main()

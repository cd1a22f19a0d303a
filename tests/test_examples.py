"""The examples, run as a person runs them, against the runtime's own answers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from networks import CLASSES, SHAPE, network
from numpy.typing import NDArray
from PIL import Image

from sqakd_deploy.api import export
from sqakd_deploy.data.augment import resize_and_crop
from sqakd_deploy.data.decode import decode_file, fit_image
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec

EXAMPLES = Path(__file__).parents[1] / "examples"
PREPROCESSING = Preprocessing(
    channels=3, input_size=SHAPE[1:], mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)
)
NAMES = ["ant", "bee", 'a "quoted" moth', "fly", "wasp"]
FACTS = {
    "sqakd.preprocessing": PREPROCESSING.model_dump_json(),
    "sqakd.classes": json.dumps(NAMES),
}
FORMS = {
    "floats": ExportOptions(),
    "pixels": ExportOptions(input_type="uint8", input_name="p", output_name="y"),
    "channels last": ExportOptions(input_type="uint8", input_layout="nhwc"),
    "fixed batch": ExportOptions(input_type="uint8", batch=3),
}


@pytest.fixture(scope="module")
def student() -> torch.fx.GraphModule:
    made = quantize(network("residual"), QuantSpec(), example=SHAPE)
    calibrate(made, [torch.from_numpy(PREPROCESSING.apply(picture(seed=1)[None].repeat(2, 0)))])
    return made.eval()


def picture(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8)


def saved(path: Path, pixels: NDArray[np.uint8]) -> Path:
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path)
    return path


def answers(model: Path, pixels: NDArray[np.uint8]) -> list[tuple[str, float]]:
    """Classes and percents as the runtime gives them, best first."""
    logits = get_runtime("onnxruntime").open(model).run(PREPROCESSING.apply(pixels[None]))[0]
    odds = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")
    return [(NAMES[k], float(100 * odds[k] / odds.sum())) for k in order]


def printed(text: str) -> list[tuple[str, float]]:
    return [
        (name, float(percent)) for percent, name in re.findall(r"^ +([\d.]+) %  (.+)$", text, re.M)
    ]


def same(got: list[tuple[str, float]], wanted: list[tuple[str, float]]) -> None:
    assert [name for name, _ in got] == [name for name, _ in wanted]
    np.testing.assert_allclose([p for _, p in got], [p for _, p in wanted], atol=0.006)


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "python" / "classify.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", list(FORMS))
def test_python(form: str, student: torch.fx.GraphModule, tmp_path: Path) -> None:
    model = export(student, tmp_path / "m.onnx", options=FORMS[form], metadata=FACTS).path
    image = saved(tmp_path / "image.png", picture())
    result = python(model, image)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{image}\n")
    same(printed(result.stdout), answers(model, picture())[:CLASSES])


def test_python_prepares_images_of_other_sizes_and_colours(
    student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    model = export(student, tmp_path / "m.onnx", metadata=FACTS).path
    wide = np.zeros((3, 8, 24), np.uint8)
    wide[:, :, 8:16] = picture()  # what the middle shows
    images = [saved(tmp_path / "wide.png", wide), tmp_path / "grey.png"]
    Image.fromarray(picture()[0]).save(images[1])
    result = python(model, *images, "--top", "2")
    assert result.returncode == 0, result.stderr
    grey = np.repeat(picture()[:1], 3, axis=0)
    same(printed(result.stdout), [*answers(model, picture())[:2], *answers(model, grey)[:2]])


@pytest.fixture(scope="module")
def example() -> Any:
    """The Python example as a module."""
    loader = importlib.util.spec_from_file_location("classify", EXAMPLES / "python/classify.py")
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


def test_python_reads_sixteen_bits_as_the_data_were(tmp_path: Path, example: Any) -> None:
    pixels = np.random.default_rng(3).integers(0, 2**16, (8, 6), dtype=np.uint16)
    facts = {"channels": 1, "input_size": (8, 6), "resize": None}
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            got = np.asarray(example.fitted(image, facts))
        np.testing.assert_array_equal(got, decode_file(tmp_path / name, 1, (8, 6))[0])
        np.testing.assert_array_equal(got, pixels // 256)
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "float.tif")
    with (
        Image.open(tmp_path / "float.tif") as image,
        pytest.raises(OSError, match="without a know"),
    ):
        example.fitted(image, facts)


@pytest.mark.parametrize("size", [(31, 17), (9, 40), (8, 8)])
def test_python_prepares_images_as_the_data_were(size: tuple[int, int], example: Any) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8))
    for channels, resize in ((3, None), (1, None), (3, 11)):
        values = {"channels": channels, "input_size": (8, 6), "resize": resize}
        stats = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
        facts = Preprocessing(**values, **stats)
        stored = fit_image(image, channels, facts.stored_size)
        wanted = torch.from_numpy(stored.copy())[None]
        if resize is not None:
            wanted = resize_and_crop(wanted, min(facts.stored_size), (8, 6))
        source = {"type": "uint8", "layout": "NCHW", "batch": None}
        got = example.prepared(image, json.loads(facts.model_dump_json()), source)
        np.testing.assert_array_equal(got, wanted.numpy())
        got = example.prepared(
            image, json.loads(facts.model_dump_json()), {**source, "type": "float32"}
        )
        np.testing.assert_array_equal(got, facts.apply(wanted.numpy()))


def test_python_explains_itself(student: torch.fx.GraphModule, tmp_path: Path) -> None:
    assert "usage: classify.py" in python("--help").stdout
    model = export(student, tmp_path / "bare.onnx").path
    result = python(model, saved(tmp_path / "image.png", picture()))
    assert result.returncode == 1
    assert "does not say how its images are prepared" in result.stderr
    for name, content in (("none.onnx", None), ("empty.onnx", b""), ("bad.onnx", b"\x08text")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        result = python(tmp_path / name, tmp_path / "image.png")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {tmp_path / name} cannot be read as a model: ")


def test_python_needs_three_packages() -> None:
    """And none of this project's."""
    source = (EXAMPLES / "python" / "classify.py").read_text(encoding="utf-8")
    packages = set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) - sys.stdlib_module_names
    assert packages == {"numpy", "onnxruntime", "PIL"}


# -- C++ -----------------------------------------------------------------------------------------


def headers() -> Path | None:
    """Where onnxruntime's C++ headers are, if they are."""
    root = os.environ.get("ONNXRUNTIME_ROOT")
    folders = (
        [Path(root) / "include"] if root else [Path("/usr/include"), Path("/usr/local/include")]
    )
    places = [place for folder in folders for place in (folder, folder / "onnxruntime")]
    return next((p for p in places if (p / "onnxruntime_cxx_api.h").exists()), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built with the headers there are and the library of the Python package."""
    compiler, include = shutil.which("g++") or shutil.which("clang++"), headers()
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if compiler is None or include is None or library is None:
        pytest.skip(
            "no C++ compiler, no onnxruntime C++ headers (Debian's libonnxruntime-dev, or a "
            "release unpacked under ONNXRUNTIME_ROOT), or no library in the Python package"
        )
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    built = folder / "classify"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", str(include)]
    command += [str(EXAMPLES / "cpp" / "classify.cpp"), "-o", str(built)]
    command += [f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return built


def cpp(program: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "floats"])
def test_cpp(form: str, program: Path, student: torch.fx.GraphModule, tmp_path: Path) -> None:
    model = export(student, tmp_path / "m.onnx", options=FORMS[form], metadata=FACTS).path
    result = cpp(program, model, saved(tmp_path / "image.ppm", picture()))
    assert result.returncode == 0, result.stderr
    same(printed(result.stdout), answers(model, picture())[:CLASSES])


def test_cpp_reads_comments_and_refuses_what_does_not_fit(
    program: Path, student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    options = FORMS["pixels"]
    model = export(student, tmp_path / "m.onnx", options=options, metadata=FACTS).path
    floats = export(student, tmp_path / "f.onnx", metadata=FACTS).path
    image, body = tmp_path / "i.ppm", picture().transpose(1, 2, 0).tobytes()
    image.write_bytes(b"P6\n# made by hand\n8 8\n# bits\n255\n" + body)
    result = cpp(program, model, image)
    assert result.returncode == 0, result.stderr
    assert "takes floats; export it with --input uint8" in cpp(program, floats, image).stderr
    for content, text in (
        (b"P3\n8 8\n255\n", "wanted a binary PPM"),
        (b"P6\n8 8\n65535\n" + body, "8 bits a channel"),
        (b"P6\n8 8\n255\n" + body[:-1], "ends before its last pixel"),
        (b"P6\n4 16\n255\n" + body, "has another size or number of channels"),
        (b"P5\n8 8\n255\n" + body, "has another size or number of channels"),
    ):
        image.write_bytes(content)
        result = cpp(program, model, image)
        assert result.returncode == 1
        assert text in result.stderr
    assert "cannot open" in cpp(program, model, tmp_path / "none.ppm").stderr

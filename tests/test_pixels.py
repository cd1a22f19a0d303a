"""Files that take raw pixels: the bits of those that take floats, and what the command says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, exact_here, network
from numpy.typing import NDArray
from torch import nn

from sqakd_deploy.api import export, export_proven
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.errors import ExportError, SpecError
from sqakd_deploy.evaluate import predict
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.parity import Tolerance, verify
from sqakd_deploy.pixels import fed_as, to_pixels
from sqakd_deploy.plugins import get_runtime
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.saturation import saturation_of

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CENTRED = ((128 / 255,) * 3, (0.5,) * 3)  # pixel 128 stands for zero, and pads
HALF = ((0.5,) * 3, (0.5,) * 3)  # 127.5 would stand for zero, and there is no such pixel


def preprocessing(stats: tuple[tuple[float, ...], tuple[float, ...]]) -> Preprocessing:
    return Preprocessing(channels=3, input_size=SHAPE[1:], mean=stats[0], std=stats[1])


def metadata(stats: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, str]:
    return {"sqakd.preprocessing": preprocessing(stats).model_dump_json()}


def pixels(count: int = 48) -> NDArray[np.uint8]:
    """Random ones, and every value in every channel."""
    every = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8).repeat(3, axis=1)
    random = np.random.default_rng(0).integers(0, 256, (count - 4, *SHAPE), dtype=np.uint8)
    return np.concatenate([every, random])


def student(
    stats: tuple[tuple[float, ...], tuple[float, ...]], **spec: object
) -> torch.fx.GraphModule:
    made = quantize(network("residual"), exact_here(QuantSpec.parse(spec)), example=SHAPE)
    calibrate(made, [torch.from_numpy(preprocessing(stats).apply(pixels()))])
    return made.eval()


class Padded(nn.Module):
    """Padding in front of the first layer, in a node of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(F.pad(x, (0, 1, 0, 1)))).mean([2, 3]))


@pytest.mark.parametrize("stats", [IMAGENET, CENTRED], ids=["nodes", "folded"])
def test_pixels_are_padded_with_the_one_that_stands_for_zero(
    stats: tuple[tuple[float, ...], tuple[float, ...]], tmp_path: Path
) -> None:
    made = quantize(Padded().eval(), exact_here(QuantSpec()), example=SHAPE)
    prepared = torch.from_numpy(preprocessing(stats).apply(pixels()))
    calibrate(made, [prepared])
    options = ExportOptions(input_type="uint8")
    _, report = export_proven(
        made, tmp_path / "m.onnx", prepared, options=options, metadata=metadata(stats)
    )
    assert report.failures == []


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("stats", "form"),
    [(IMAGENET, "nodes"), (HALF, "nodes"), (PLAIN, "folded"), (CENTRED, "folded")],
    ids=["imagenet", "half", "plain", "centred"],
)
def test_pixels_give_the_bits_of_floats(
    stats: tuple[tuple[float, ...], tuple[float, ...]], form: str, layout: str, tmp_path: Path
) -> None:
    made, facts = student(stats), metadata(stats)
    floats = export(made, tmp_path / "floats.onnx", metadata=facts)
    options = ExportOptions(input_type="uint8", input_layout=layout)  # type: ignore[arg-type]
    raw = export(made, tmp_path / "raw.onnx", options=options, metadata=facts)
    said = "the codes of the first layer's input, " if form == "folded" else "stays as float nodes"
    assert said in raw.input_form
    model = onnx.load(raw.path)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Div") == (0 if form == "folded" else 2)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    ours, theirs = (
        {layer.layer: layer.max_act for layer in saturation_of(QdqFile(a.path), "vnni").layers}
        for a in (raw, floats)
    )
    assert ours == theirs  # the first layer, which no quantizer precedes, among them
    runtime, images = get_runtime("onnxruntime"), preprocessing(stats).apply(pixels())
    expected = predict(made, [torch.from_numpy(images)])
    step = lower(made).values[lower(made).output].grid
    assert step is not None
    for optimize in (False, True):
        wanted = runtime.open(floats.path, optimize=optimize).run(images)
        session = runtime.open(raw.path, optimize=optimize)
        got = session.run(pixels())  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(session.run(images), wanted)
        assert np.abs(got - expected).max() <= 2.001 * step.scale
    assert runtime.open(raw.path).coverage().integer == runtime.open(floats.path).coverage().integer


def test_a_float_first_layer_reads_normalised_pixels(tmp_path: Path) -> None:
    made, facts = student(IMAGENET, placement="paper"), metadata(IMAGENET)
    floats = export(made, tmp_path / "floats.onnx", metadata=facts)
    options = ExportOptions(input_type="uint8")
    raw = export(made, tmp_path / "raw.onnx", options=options, metadata=facts)
    assert "stays as float nodes" in raw.input_form
    images = preprocessing(IMAGENET).apply(pixels())
    for optimize in (False, True):
        wanted = get_runtime("onnxruntime").open(floats.path, optimize=optimize).run(images)
        got = get_runtime("onnxruntime").open(raw.path, optimize=optimize).run(images)
        np.testing.assert_array_equal(got, wanted)


def test_the_proof_runs_the_file_for_pixels(tmp_path: Path) -> None:
    """A wrong standard deviation in the file's nodes shows; PyTorch saw the right one."""
    made, path = student(IMAGENET), tmp_path / "model.onnx"
    images = torch.from_numpy(preprocessing(IMAGENET).apply(pixels()))
    options = ExportOptions(input_type="uint8", batch=5, pack=False)
    artifact, report = export_proven(
        made, path, images, options=options, metadata=metadata(IMAGENET)
    )
    assert report.failures == []
    assert max(stage.max_error for stage in report.stages) < 2.1
    assert artifact.path == path
    assert artifact.input_form.startswith("uint8: ")
    model = onnx.load(path)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [5, 3, 8, 8]
    (std,) = (tensor for tensor in model.graph.initializer if tensor.name == "normalise/std")
    wrong = np.array([2.0, 1.0, 0.3], np.float32).reshape(3, 1, 1)
    std.CopyFrom(onnx.numpy_helper.from_array(wrong, std.name))
    onnx.save(model, path)
    assert min(stage.max_error for stage in verify(path, made, images).stages[1:]) > 5


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_a_fixed_batch_serves_any_number_of_images(count: int, tmp_path: Path) -> None:
    made = student(IMAGENET)
    images = preprocessing(IMAGENET).apply(pixels())[:count]
    logits = []
    for batch in (None, 4):
        file = export(made, tmp_path / "m.onnx", options=ExportOptions(batch=batch))
        logits.append(get_runtime("onnxruntime").open(file.path).run(images))
    assert logits[1].shape == (count, 5)
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("input_type", ["float32", "uint8"])
def test_what_the_file_says_of_its_input(input_type: str, tmp_path: Path) -> None:
    options = ExportOptions(input_type=input_type, batch=2, input_name="pixels", output_name="y")  # type: ignore[arg-type]
    made = student(IMAGENET)
    file = export(made, tmp_path / "m.onnx", options=options, metadata=metadata(IMAGENET))
    model = onnx.load(file.path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    raw = input_type == "uint8"
    assert json.loads(said["sqakd.input"]) == {
        "name": "pixels",
        "type": input_type,
        "layout": "NCHW",
        "batch": 2,
        "range": [0, 255] if raw else None,
        "normalisation": "nodes" if raw else "caller",
    }
    assert said["sqakd.preprocessing"] == metadata(IMAGENET)["sqakd.preprocessing"]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["pixels", "y"]


def test_names_that_inner_values_have_too_are_given_to_the_outside(tmp_path: Path) -> None:
    made = student(IMAGENET)
    graph = lower(made)
    inner = [node.output for node in graph.nodes[:2]]
    options = ExportOptions(input_name=inner[1], output_name=inner[0])
    file = export(made, tmp_path / "m.onnx", options=options)
    model = onnx.load(file.path)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == inner[::-1]
    images = torch.from_numpy(preprocessing(IMAGENET).apply(pixels()))
    assert verify(file, made, images).failures == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"batch": 0}, "batch: wanted at least 1, or None for any, got 0"),
        ({"input_type": "int8"}, "input: wanted float32 or uint8, got 'int8'"),
        ({"input_layout": "chwn"}, "input_layout: wanted nchw or nhwc, got 'chwn'"),
        ({"input_layout": "nhwc"}, "nhwc is for raw pixels"),
        ({"input_name": " "}, "input_name: wanted a name, got an empty one"),
        ({"output_name": ""}, "output_name: wanted a name, got an empty one"),
    ],
)
def test_bad_options_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ExportOptions(**values)  # type: ignore[arg-type]


def test_unknown_or_unfit_preprocessing_is_refused() -> None:
    graph, options = lower(student(IMAGENET)), ExportOptions(input_type="uint8")
    with pytest.raises(SpecError, match=r"wanted the preprocessing under 'sqakd\.preprocessing'"):
        fed_as(graph, options)
    other = preprocessing(IMAGENET).changed(input_size=(8, 9)).model_dump_json()
    with pytest.raises(SpecError, match=r"takes images \(3, 8, 8\), the preprocessing gives"):
        fed_as(replace(graph, metadata={"sqakd.preprocessing": other}), options)
    with pytest.raises(SpecError, match="wanted JSON"):
        fed_as(replace(graph, metadata={"sqakd.preprocessing": "{"}), options)


def test_images_that_are_no_pixels_are_refused() -> None:
    facts = metadata(IMAGENET)
    images = preprocessing(IMAGENET).apply(pixels())
    np.testing.assert_array_equal(to_pixels(images, facts), pixels())
    for wrong in (images + 0.01, images * 2, np.full_like(images, np.nan)):
        with pytest.raises(ExportError, match="these images are not pixels prepared as it says"):
            to_pixels(wrong, facts)
    with pytest.raises(ExportError, match=r"wanted images \(N, 3, H, W\), got \[48, 1, 8, 8\]"):
        to_pixels(images[:, :1], facts)


@pytest.mark.parametrize("suffix", ["onnx", "xml"])
@pytest.mark.parametrize("stats", [IMAGENET, CENTRED], ids=["nodes", "folded"])
def test_openvino_takes_pixels_in_fixed_batches(
    stats: tuple[tuple[float, ...], tuple[float, ...]], suffix: str, tmp_path: Path
) -> None:
    """It may multiply by 1/std: a code of the input then lands on its neighbour, seldom."""
    pytest.importorskip("openvino")
    made, facts = student(stats, target="openvino"), metadata(stats)
    options = ExportOptions(input_type="uint8", batch=20)
    raw = export(made, tmp_path / f"raw.{suffix}", options=options, metadata=facts)
    images = torch.from_numpy(preprocessing(stats).apply(pixels()))
    report = verify(raw, made, images, tolerance=Tolerance(agreement=97.0))  # but for one tie
    assert report.samples == 48
    assert report.failures == []
    # Rule O12: of a fixed shape, the sum is no part of the convolution's kernel.
    assert [fallback.op_type for fallback in report.coverage.fallbacks] == ["Add"]
    assert max(stage.max_error for stage in report.stages) <= 2.001


CHANNELS = ((0.5, 0.4, 0.45), (0.2, 0.25, 0.3))


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("suffix", ["onnx", "xml"])
@pytest.mark.parametrize(
    "stats",
    [CHANNELS, ((0.0,) * 3, CHANNELS[1]), HALF],
    ids=["channels", "std", "equal"],
)
def test_openvino_bounds_prepared_pixels_where_the_student_does(
    stats: tuple[tuple[float, ...], tuple[float, ...]], suffix: str, bits: int, tmp_path: Path
) -> None:
    """Of a mean for each channel and the bounds behind it, it makes one rounding with others."""
    pytest.importorskip("openvino")
    made, facts = student(stats, target="openvino", first_last_bits=bits), metadata(stats)
    images = torch.from_numpy(preprocessing(stats).apply(pixels()))
    path, options = tmp_path / f"raw.{suffix}", ExportOptions(input_type="uint8")
    tolerance = Tolerance(agreement=97.0)  # but for one tie
    _, report = export_proven(
        made, path, images, options=options, metadata=facts, tolerance=tolerance
    )
    assert report.failures == []
    assert all(stage.mean_error < 0.05 for stage in report.stages)


def test_a_mean_that_is_spread_over_the_image_is_held_to_the_one_stated(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    made, path = student(CHANNELS, target="openvino"), tmp_path / "raw.onnx"
    options = ExportOptions(input_type="uint8", pack=False)
    export(made, path, options=options, metadata=metadata(CHANNELS))
    images = torch.from_numpy(preprocessing(CHANNELS).apply(pixels(8)))
    tolerance = Tolerance(agreement=80.0)
    assert verify(path, made, images, tolerance=tolerance).failures == []
    model = onnx.load(path)
    (mean,) = (tensor for tensor in model.graph.initializer if tensor.name == "normalise/mean")
    wrong = np.array([0.5, np.nextafter(np.float32(0.4), np.float32(1)), 0.45], np.float32)
    mean.CopyFrom(onnx.numpy_helper.from_array(wrong.reshape(3, 1, 1), mean.name))
    onnx.save(model, path)
    (failure,) = verify(path, made, images, tolerance=tolerance).failures
    assert "the student has no such Sub behind" in failure

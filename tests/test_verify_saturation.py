"""Whether pairs of products can leave int16: against every pair there is."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from integer_graphs import CASES, INT8, UINT8, Builder, images
from reference_executor import logits
from sqakd_exporters.onnxruntime import OnnxRuntime, OnnxRuntimeExporter

from sqakd_deploy import graph as g
from sqakd_deploy.cpu import this_cpu
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.saturation import (
    LayerSaturation,
    SaturationReport,
    cure_for,
    saturation_in,
    saturation_of,
    worst_pair,
)
from sqakd_deploy.verification.stages import in_one_line

codes = st.lists(st.integers(-128, 127), min_size=1, max_size=5)


@given(st.lists(codes, min_size=1, max_size=3), st.integers(0, 255))
def test_a_layer_is_immune_if_and_only_if_no_pair_saturates(
    channels: list[list[int]], largest: int
) -> None:
    width = max(map(len, channels))
    weight = np.array([row + [0] * (width - len(row)) for row in channels], np.int8)
    sums = [
        a * int(first) + b * int(second)
        for row in weight
        for first, second in combinations([*row, 0], 2)
        for a in (0, largest)
        for b in (0, largest)
    ]
    worst = worst_pair(weight) * largest
    assert (-32768 <= worst <= 32767) == all(-32768 <= s <= 32767 for s in sums)
    assert abs(worst) == max(map(abs, sums))


def layers(graph: g.IntegerGraph, folder: Path) -> dict[str, LayerSaturation]:
    path = OnnxRuntimeExporter().export(graph, folder / "a.onnx", ExportOptions()).path
    return {layer.layer: layer for layer in saturation_of(QdqFile(path), "vnni").layers}


def with_weights(codes: list[int], bounds: tuple[int, int], zero: int) -> g.IntegerGraph:
    """A 1×1 convolution of three channels of pixels."""
    b = Builder()
    x = b.quantize("image", "x", bounds, zero)
    weight = g.IntWeight(
        np.array(codes, np.int8).reshape(1, 3, 1, 1), np.array([0.01], np.float32), 8, False
    )
    x = b.append(g.Conv, "conv", x, weight=weight, bias=None, stride=(1, 1),
                 padding=(0, 0, 0, 0), dilation=(1, 1), groups=1)  # fmt: skip
    return b.graph(b.quantize("out", x, UINT8, 128))


@pytest.mark.parametrize(
    ("weights", "bounds", "zero", "worst", "immune"),
    [
        ([64, 64, -64], UINT8, 128, 255 * 128, True),  # rule 19: |w| ≤ 64 is immune
        ([64, 65, 0], UINT8, 128, 255 * 129, False),
        ([-64, -64, 64], UINT8, 128, -255 * 128, True),
        ([-64, -65, 127], UINT8, 128, -255 * 129, False),
        ([100, -128, 1], UINT8, 128, -255 * 128, True),  # of one sign: 128 alone, at 255
        ([127, 127, 127], (0, 15), 0, 15 * 254, True),  # activations ≤ 15 are immune
        ([127, 127, 127], (0, 129), 60, 129 * 254, True),
        ([127, 127, 127], (0, 130), 60, 130 * 254, False),
        ([65, 64, 0], INT8, 0, 255 * 129, False),  # kernels shift int8 to uint8
    ],
)
def test_the_rule_at_its_borders(
    weights: list[int], bounds: tuple[int, int], zero: int, worst: int, immune: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = layers(with_weights(weights, bounds, zero), tmp_path)["conv"]
    assert (found.sum, found.immune) == (worst, immune)


def test_every_integer_layer_is_there(tmp_path: Path) -> None:
    found = layers(CASES["residual"]().graph, tmp_path)
    assert set(found) == {"stem", "onea", "oneb", "twoa", "twob", "fc"}
    assert [name for name, layer in found.items() if not layer.immune] == ["stem", "fc"]
    assert found["oneb"].max_act == 15
    assert found["onea"].max_act == 255  # the same levels at the top of the type


def test_layers_with_float_weights_or_inputs_are_not(tmp_path: Path) -> None:
    assert set(layers(CASES["floats"]().graph, tmp_path)) == {"fc"}
    assert "no layer has integer" in SaturationReport((), "vnni").summary


@pytest.mark.parametrize(
    ("text", "machine", "cpu", "meaning"),
    [
        ("flags\t\t: fpu avx2 avx512_vnni\n", "x86_64", "vnni", "this CPU has VNNI and does not"),
        ("flags\t\t: fpu avx2 avx_vnni\n", "AMD64", "vnni", "this CPU has VNNI and does not"),
        ("flags\t\t: fpu avx2 avx512f\n", "x86_64", "no vnni", "this CPU has no VNNI, so this"),
        ("nothing\n", "x86_64", "unknown", "whether this CPU has VNNI cannot be told"),
        (None, "x86_64", "unknown", "whether this CPU has VNNI cannot be told"),
        ("Features : asimddp\n", "aarch64", "not x86", "not applicable to this CPU"),
    ],
)
def test_what_it_means_here(
    text: str | None, machine: str, cpu: str, meaning: str, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    if text is not None:
        info.write_text(text)
    assert this_cpu(info, machine) == cpu
    layer = LayerSaturation("conv1", 255, 200, 51000, False)
    report = SaturationReport((layer,), this_cpu(info, machine))
    assert "possible in 1 of 1 integer layer (conv1)" in report.summary
    assert meaning in report.summary


def test_where_nothing_can_saturate_no_cpu_matters() -> None:
    layer = LayerSaturation("conv1", 15, 16, 240, True)
    assert "impossible in 1 integer layer; the" in SaturationReport((layer,), "no vnni").summary


def error(got: np.ndarray, graph: g.IntegerGraph, array: np.ndarray) -> float:
    """In steps of the output."""
    grid = graph.values[graph.output].grid
    assert grid is not None
    return float(np.abs(got - logits(graph, array)).max()) / float(grid.scale)


@pytest.mark.parametrize("name", ["plain", "signed", "residual", "two_steps", "pools"])
@pytest.mark.parametrize("widest", [7, 8])
def test_answers_change_only_where_it_is_said(
    widest: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime by its defaults and OpenVINO saturate on this CPU if it has no VNNI, and only
    in files that are not immune; ONNX Runtime as told here never does."""
    openvino = pytest.importorskip("sqakd_exporters.openvino")
    monkeypatch.setattr(Builder, "widest", widest)
    graph = CASES[name]().graph
    array = images(48, graph.values[graph.input].shape[1:], seed=5)  # type: ignore[arg-type]
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    other = openvino.OpenVinoExporter().export(graph, tmp_path / "b.onnx", ExportOptions()).path
    report = saturation_of(QdqFile(path))
    assert bool(report.at_risk) == (widest == 8)
    defaults = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = {
        "defaults": defaults.run(None, {defaults.get_inputs()[0].name: array})[0],
        "openvino": openvino.OpenVinoRuntime().open(other).run(array),
        "told": OnnxRuntime().open(path).run(array),
    }
    errors = {who: error(got, graph, array) for who, got in found.items()}
    changed = report.cpu == "no vnni" and widest == 8
    assert errors["told"] < 1e-3
    assert (errors["defaults"] > 0.5, errors["openvino"] > 0.5) == (changed, changed)


@pytest.mark.parametrize("name", ["plain", "signed", "residual", "branches", "joined", "floats"])
def test_a_file_and_its_student_say_the_same(name: str, tmp_path: Path) -> None:
    """Files of other formats than ONNX have the student's word alone."""
    graph = CASES[name]().graph
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    assert saturation_in(graph).at_risk == saturation_of(QdqFile(path)).at_risk


@pytest.mark.parametrize("pack", [True, False])
def test_wide_layers_share_no_constant(pack: bool, tmp_path: Path) -> None:
    """ONNX Runtime changes theirs where it must not saturate, and refuses to do it twice."""
    b = Builder()
    x = b.quantize("image", "x", UINT8, 128)
    for name, bits in (("one", 8), ("two", 8), ("three", 4), ("four", 4)):
        x = b.layer(name, x, 64, bits=bits)
    path = tmp_path / "a.onnx"
    OnnxRuntimeExporter().export(b.graph(x), path, ExportOptions(pack=pack))
    nodes = onnx.load(path).graph.node
    constants = [node for node in nodes if node.op_type == "DequantizeLinear" and node.attribute]
    zeros = [node.input[2] for node in constants[::2]]  # of weights; those of biases are between
    assert len(set(zeros)) == 3
    assert zeros[2] == zeros[3]
    OnnxRuntime().open(path).run(images(2))


def test_files_whose_wide_layers_share_constants_load_all_the_same(tmp_path: Path) -> None:
    b = Builder()
    x = b.quantize("image", "x", UINT8, 128)
    for name in ("one", "two"):
        x = b.layer(name, x, 64, bits=8)
    path = tmp_path / "a.onnx"
    OnnxRuntimeExporter().export(b.graph(x), path, ExportOptions())
    model = onnx.load(path)
    first, _, second, _ = (
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.attribute
    )
    second.input[2] = first.input[2]
    onnx.save(model, path)
    assert OnnxRuntime().open(path).run(images(2)).shape == (2, 64, 8, 8)
    assert OnnxRuntime().open(path).coverage().fallbacks == ()


def test_a_failure_names_what_may_be_behind_it() -> None:
    layer = LayerSaturation("conv1", 255, 200, 51000, False)
    immune = LayerSaturation("conv2", 15, 200, 3000, True)
    assert "sums can saturate in conv1 (" in SaturationReport((layer, immune), "no vnni").suspicion
    assert "--first-last-bits 7" in SaturationReport((layer,), "no vnni").suspicion
    assert SaturationReport((layer,), "vnni").suspicion == ""
    assert SaturationReport((immune,), "no vnni").suspicion == ""
    lines = in_one_line(["a", "b"], SaturationReport((layer,), "no vnni"))
    assert lines.startswith("a; b; this CPU has no VNNI")
    assert in_one_line(["a", "b"], SaturationReport((layer,), "vnni")) == "a; b"


@pytest.mark.parametrize(
    ("spec", "cure"),
    [
        ({}, "weights of fewer bits cannot (--first-last-bits 7)"),
        ({"weights": {"bits": 8}, "activations": {"bits": 8}},
         "weights of fewer bits cannot (--first-last-bits 7, --bits w7a8)"),
        ({"weights": {"method": "pact"}}, "weights of fewer bits cannot (--first-last-bits 6)"),
        ({"first_last_bits": 7, "layer_bits": {"c": "8"}},
         "weights of fewer bits cannot (--layer-bits of at most w7)"),
        ({"first_last_bits": 7}, ""),
        ({"target": "openvino"}, ""),  # which has them at 7 already
        ({"target": "openvino", "weights": {"bits": 8}},
         "weights of fewer bits cannot (--bits w7a4)"),
    ],
)  # fmt: skip
def test_only_what_a_student_does_not_have_is_advised(spec: dict[str, Any], cure: str) -> None:
    layer = LayerSaturation("conv1", 255, 200, 51000, False)
    parsed = QuantSpec.parse(spec)
    assert cure_for(parsed) == cure
    report = SaturationReport((layer,), "no vnni", parsed.target, cure_for(parsed))
    assert ("x64quantprecision" in report.summary) == (parsed.target == "onnxruntime")
    assert "; ; " not in report.summary
    for text in (report.summary, report.suspicion):
        assert cure in text
        assert ("--" in text) == bool(cure)


def test_a_file_and_its_student_get_the_same_advice(tmp_path: Path) -> None:
    spec = QuantSpec(weights=TensorSpec(bits=8), first_last_bits=7, target="openvino")
    graph = CASES["plain"]().graph
    path = OnnxRuntimeExporter().export(graph, tmp_path / "a.onnx", ExportOptions()).path
    model = onnx.load(path)
    del model.metadata_props[:]
    for key, value in (("sqakd.spec", spec.model_dump_json()), ("sqakd.target", '"openvino"')):
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    read, known = saturation_of(QdqFile(path)), saturation_in(graph, spec)
    assert (read.target, read.cure) == (known.target, known.cure)
    assert read.target == "openvino"
    assert read.cure == "weights of fewer bits cannot (--bits w7a4)"

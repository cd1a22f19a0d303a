"""Packed weights: the codes come back, the runtime folds them, nothing else changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_graphs import UINT8, Builder, images, vector
from networks import images as network_images
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from reference_executor import logits
from sqakd_exporters.coverage import measure
from sqakd_exporters.onnxruntime import OnnxRuntime, OnnxRuntimeExporter
from sqakd_exporters.openvino import OpenVinoExporter, OpenVinoRuntime
from sqakd_exporters.packing import PACKED_BITS, PLANES, Packed, pack, plan

from sqakd_deploy import commands
from sqakd_deploy import graph as g
from sqakd_deploy.abilities import PackingExporter, packs_of
from sqakd_deploy.api import export, export_proven
from sqakd_deploy.cli import main
from sqakd_deploy.errors import ExportError, SpecError
from sqakd_deploy.exporting import (
    Artifact,
    ExportOptions,
    FloatFallback,
    PlacementRules,
)
from sqakd_deploy.lowering.integer import snap_biases
from sqakd_deploy.models import build_model
from sqakd_deploy.parity import ParityReport, information_size
from sqakd_deploy.quantization import calibrate, quantize, reestimate_batch_norm
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.reference import load_reference, save_reference
from sqakd_deploy.verification.student import reference_of
from sqakd_deploy.verification.tables import coverage_lines

SHAPE = (3, 4, 4)
GRIDS = [
    (bits, mid_rise)
    for bits in range(1, 9)
    for mid_rise in (False, True)
    if bits < 8 or not mid_rise
]


def unpacked(packed: Packed) -> np.ndarray:
    """The codes, from the bits alone: what is in the tables plays no part."""
    count = int(np.prod(packed.shape))
    k, low = np.zeros(count, np.int64), 0
    for plane in packed.planes:
        bits = np.unpackbits(plane.data, bitorder="little")
        fields = bits[: len(bits) // plane.width * plane.width].reshape(-1, plane.width)
        k += (fields[:count] << np.arange(plane.width)).sum(axis=1) << low
        low += plane.width
    base = 1 - 2**packed.bits if packed.step == 2 else -(2 ** (packed.bits - 1))
    codes = (packed.step * k + base).reshape(packed.shape)
    shift = np.zeros(packed.shape[0], np.int8) if packed.shift is None else packed.shift
    return codes + shift.reshape(-1, *[1] * (len(packed.shape) - 1))


def restored(packed: Packed) -> np.ndarray:
    """The codes, by the tables, summed in int8 as in the file; a sum that leaves int8 fails."""
    total = np.zeros(int(np.prod(packed.shape)), np.int64)
    for plane in packed.planes:
        total += plane.table[plane.data].reshape(-1)[: len(total)]
        assert np.abs(total + 0.5).max() < 128
    rows = total.reshape(packed.shape[0], -1)
    if packed.shift is not None:
        rows = rows + packed.shift.astype(np.int64)[:, None]
    return rows.reshape(packed.shape)


def grid_codes(bits: int, mid_rise: bool) -> np.ndarray:
    if mid_rise:
        return np.arange(1 - 2**bits, 2**bits, 2)
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    return np.arange(lowest, 2 ** (bits - 1))


def weight_of(codes: np.ndarray, bits: int, mid_rise: bool) -> g.IntWeight:
    scale = np.linspace(0.02, 0.05, len(codes)).astype(np.float32)
    return g.IntWeight(codes.astype(np.int8), scale, bits, mid_rise)


@st.composite
def weights(draw: st.DrawFn) -> g.IntWeight:
    """Codes of any grid and shape, some channels negated, some switched off."""
    bits, mid_rise = draw(st.sampled_from([grid for grid in GRIDS if grid[0] < 8]))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = random.choice(grid_codes(bits, mid_rise), size=shape)
    signs = draw(st.lists(st.sampled_from([1, -1, 0]), min_size=shape[0], max_size=shape[0]))
    return weight_of(codes * np.reshape(signs, (-1, *[1] * (len(shape) - 1))), bits, mid_rise)


@given(weights())
@settings(deadline=None)
def test_codes_come_back(weight: g.IntWeight) -> None:
    packed = pack(weight)
    assert packed is not None
    assert packed.bits == weight.bits
    np.testing.assert_array_equal(unpacked(packed), weight.codes)
    np.testing.assert_array_equal(restored(packed), weight.codes)
    held = sum(plane.data.size for plane in packed.planes)
    assert held <= -(-weight.codes.size * weight.bits // 8) + len(packed.planes) - 1


@given(st.integers(1, 7), st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_any_codes_come_back_or_are_left_alone(bits: int, mid_rise: bool, seed: int) -> None:
    """Codes that a raised scale rounded again lie on no grid; then more bits hold them, or none."""
    random = np.random.default_rng(seed)
    codes = random.integers(-random.integers(1, 129), 127, size=(3, 7))
    packed = pack(weight_of(codes, bits, mid_rise))
    if packed is None:
        assert np.ptp(codes, axis=1).max() > 127 or np.abs(codes).max() > 63
    else:
        np.testing.assert_array_equal(unpacked(packed), codes)
        np.testing.assert_array_equal(restored(packed), codes)


def test_the_lowest_code_of_a_negated_channel() -> None:
    """−8 becomes 8, which four signed bits cannot hold: the channel is shifted by one."""
    codes = np.array([[-8, 7, 0], [8, -7, 0], [8, 7, 6], [0, 0, 0]])
    packed = pack(weight_of(codes, 4, mid_rise=False))
    assert packed is not None
    assert packed.bits == 4
    assert packed.shift is not None
    assert packed.shift.tolist() == [0, 1, 14, 0]
    np.testing.assert_array_equal(unpacked(packed), codes)


def test_a_channel_without_a_code_of_an_odd_grid() -> None:
    packed = pack(weight_of(np.array([[-3, 1, 3], [0, 0, 0]]), 2, mid_rise=True))
    assert packed is not None
    assert (packed.bits, packed.step) == (2, 2)
    np.testing.assert_array_equal(unpacked(packed), [[-3, 1, 3], [0, 0, 0]])


def test_odd_and_even_codes_in_one_channel_take_more_bits() -> None:
    packed = pack(weight_of(np.array([[-3, 0, 3]]), 2, mid_rise=True))
    assert packed is not None
    assert (packed.bits, packed.step) == (3, 1)
    np.testing.assert_array_equal(unpacked(packed), [[-3, 0, 3]])


def test_whole_bytes_stay_whole() -> None:
    assert pack(weight_of(np.array([[-127, 127]]), 8, mid_rise=False)) is None
    assert pack(weight_of(np.array([[-128, 127]]), 4, mid_rise=False)) is None
    assert set(PLANES) == PACKED_BITS == set(range(1, 8))
    assert all(sum(widths) == bits for bits, widths in PLANES.items())


# -- in files ---------------------------------------------------------------------------------


def stack(
    bits: int, mid_rise: bool, *, per_channel: bool = True, negated: bool = True, kernel: int = 3,
    channels: int = 64,
) -> g.IntegerGraph:  # fmt: skip
    """Two convolutions, grouped and not, and a linear layer, of one grid, every code in use."""
    b = Builder(shape=SHAPE)
    x = b.quantize("image", "x", UINT8, 128)
    x = b.layer("stem", x, channels, bits=8)
    x = b.layer("conv", x, channels, bits=bits, mid_rise=mid_rise, kernel=kernel, act_bits=4)
    x = b.layer("grouped", x, channels, bits=bits, mid_rise=mid_rise, groups=2, act_bits=4)
    mean = b.quantize("mean", b.append(g.GlobalAveragePool, "pool", x), UINT8)
    flat = b.append(g.Reshape, "flatten", mean, shape=(None, channels))
    x = b.quantize("hidden", b.linear("wide", flat, 400, bits=bits, mid_rise=mid_rise), UINT8, 128)
    graph = b.graph(b.quantize("logits", b.linear("fc", x, 5, bits=8), UINT8, 128))
    random = np.random.default_rng(bits)

    def changed(node: g.Node) -> g.Node:
        if getattr(node, "name", "") not in ("conv", "grouped", "wide"):
            return node
        shape = node.weight.codes.shape  # type: ignore[attr-defined]
        codes = random.choice(grid_codes(bits, mid_rise), size=shape)
        if negated:
            codes[::3] *= -1
            codes[1] = 0
        scale = node.weight.scale if per_channel else np.full_like(node.weight.scale, 0.03)  # type: ignore[attr-defined]
        source = graph.values[node.inputs[0]].grid
        assert source is not None
        accumulator = np.float32(source.scale) * scale
        bias = g.IntBias(random.integers(-50, 50, len(scale)).astype(np.int32), accumulator)
        weight = g.IntWeight(codes.astype(np.int8), scale, bits, mid_rise)
        return replace(node, weight=weight, bias=bias)  # type: ignore[call-arg]

    return replace(graph, nodes=tuple(changed(node) for node in graph.nodes))


def write(
    graph: g.IntegerGraph, folder: Path, *, pack: bool | None, opset: int | None = None
) -> Path:
    path = folder / f"{pack}.onnx"
    return OnnxRuntimeExporter().export(graph, path, ExportOptions(opset=opset, pack=pack)).path


def optimised(path: Path, folder: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("bits", "mid_rise"), GRIDS)
def test_the_same_kernels_and_the_same_answers(
    bits: int, mid_rise: bool, per_channel: bool, tmp_path: Path
) -> None:
    """One scale for each channel comes with channels that a BatchNorm negated, or switched off."""
    graph = stack(bits, mid_rise, per_channel=per_channel, negated=per_channel)
    paths = {pack: write(graph, tmp_path, pack=pack) for pack in (True, False)}
    array = images(6, SHAPE, seed=5)
    for optimize in (False, True):
        packed, plain = (
            OnnxRuntime().open(p, optimize=optimize).run(array) for p in paths.values()
        )
        np.testing.assert_array_equal(packed, plain)
    made = {pack: optimised(path, tmp_path) for pack, path in paths.items()}
    assert operators(made[True]) == operators(made[False])
    assert not {"Gather", "Cast", "Reshape", "Slice", "Add"} & set(operators(made[True]))
    coverage = OnnxRuntime().open(paths[True]).coverage()
    assert coverage.unfolded == ()
    assert coverage.packed == (3 if bits < 8 else 0)
    assert coverage.fallbacks == ()
    assert (paths[True].stat().st_size < paths[False].stat().st_size) == (bits < 8)


@pytest.mark.parametrize("suffix", ["onnx", "xml"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize(("bits", "mid_rise"), [(4, False), (3, False), (2, True), (1, True)])
def test_openvino_counts_what_is_packed(
    bits: int, mid_rise: bool, pack: bool, suffix: str, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    graph = stack(bits, mid_rise)
    path = tmp_path / f"m.{suffix}"
    artifact = OpenVinoExporter().export(graph, path, ExportOptions(pack=pack))
    coverage = OpenVinoRuntime().open(path, threads=1).coverage()
    assert coverage.packed == (3 if pack else 0)
    assert coverage.fallbacks == ()
    plain = OpenVinoExporter().export(graph, tmp_path / f"p.{suffix}", ExportOptions(pack=False))
    weights = [a.companions[0] if a.companions else a.path for a in (artifact, plain)]
    smaller, larger = (file.stat().st_size for file in weights)
    assert (smaller < larger) == pack


def weight_in(model: onnx.ModelProto, layer: str) -> np.ndarray:
    """What the file holds as a layer's codes, evaluated node by node by onnx itself."""
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    (wanted,) = [node.input[1] for node in model.graph.node if node.name == layer]
    for node in model.graph.node:
        if node.output[0] == wanted:
            return held[node.input[0]]
        if node.op_type != "DequantizeLinear" and set(node.input) <= set(held):
            one = helper.make_graph(
                [node], "one", [], [helper.make_empty_tensor_value_info(node.output[0])]
            )
            one.initializer.extend(
                numpy_helper.from_array(held[name], name) for name in set(node.input)
            )
            single = helper.make_model(one, opset_imports=model.opset_import)
            (held[node.output[0]],) = ReferenceEvaluator(single).run(None, {})
    raise LookupError(layer)


@pytest.mark.parametrize(("bits", "mid_rise"), [(3, False), (4, True), (1, True)])
def test_every_code_is_the_one_of_the_reference(bits: int, mid_rise: bool, tmp_path: Path) -> None:
    """onnx's own evaluator restores the weights, and int64 arithmetic agrees with the file."""
    graph = stack(bits, mid_rise)
    path = write(graph, tmp_path, pack=True)
    model = onnx.load(path)
    for node in graph.nodes:
        codes = getattr(getattr(node, "weight", None), "codes", None)
        if codes is None:
            continue
        np.testing.assert_array_equal(weight_in(model, node.name), codes)
    array = images(6, SHAPE, seed=5)
    step = graph.values[graph.output].grid
    assert step is not None
    error = np.abs(OnnxRuntime().open(path).run(array) - logits(graph, array)).max() / step.scale
    assert error < 1e-4


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_codes_that_do_not_fill_the_last_byte(bits: int, tmp_path: Path) -> None:
    graph = stack(bits, mid_rise=bits == 1, channels=62, kernel=1, negated=False)
    counts = {node.weight.codes.size % 8 for node in graph.nodes if hasattr(node, "weight")}
    assert counts - {0}
    packed, plain = (write(graph, tmp_path, pack=pack) for pack in (True, False))
    array = images(4, SHAPE, seed=5)
    for optimize in (False, True):
        got, wanted = (OnnxRuntime().open(p, optimize=optimize).run(array) for p in (packed, plain))
        np.testing.assert_array_equal(got, wanted)
    assert OnnxRuntime().open(packed).coverage().unfolded == ()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("mid_rise", [False, True])
def test_a_file_is_as_small_as_its_bits(bits: int, mid_rise: bool, tmp_path: Path) -> None:
    """At most 5 % over weights at their bits, scales and biases; biases here fit into a byte."""
    graph = stack(bits, mid_rise, negated=False, channels=256)
    wanted = information_size(graph)
    assert wanted > 120_000
    size = write(graph, tmp_path, pack=True).stat().st_size
    assert wanted - 3 * (2 * 256 + 400) < size <= 1.05 * wanted


def with_biases(graph: g.IntegerGraph, ends: tuple[int, int]) -> g.IntegerGraph:
    """Biases of 4-bit layers from one number to another."""

    def changed(node: g.Node) -> g.Node:
        if node.name not in ("conv", "grouped", "wide"):
            return node
        bias = node.bias  # type: ignore[attr-defined]
        codes = np.linspace(*ends, len(bias.codes)).astype(np.int32)
        return replace(node, bias=replace(bias, codes=codes))  # type: ignore[call-arg]

    return replace(graph, nodes=tuple(changed(node) for node in graph.nodes))


@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        ((-128, 127), np.int8),
        ((-129, 127), np.int16),
        ((-128, 128), np.int16),
        ((-32768, 32767), np.int16),
        ((-32769, 0), np.int32),
        ((0, 32768), np.int32),
    ],
)
@pytest.mark.parametrize("per_channel", [True, False])
def test_biases_take_as_few_bytes_as_hold_them(
    ends: tuple[int, int], kind: type, per_channel: bool, tmp_path: Path
) -> None:
    graph = with_biases(stack(4, mid_rise=False, per_channel=per_channel), ends)
    paths = [write(graph, tmp_path, pack=pack) for pack in (True, False)]
    held = [numpy_helper.to_array(t) for t in onnx.load(paths[0]).graph.initializer]
    widest = np.linspace(*ends, 400).astype(kind)
    assert [a.dtype for a in held if np.array_equal(a, widest)] == [kind]
    array = images(4, SHAPE, seed=5)
    for runtime in (OnnxRuntime(), OpenVinoRuntime()):
        for optimize in (False, True):
            packed, plain = (runtime.open(path, optimize=optimize).run(array) for path in paths)
            np.testing.assert_array_equal(packed, plain)
    assert OnnxRuntime().open(paths[0]).coverage().unfolded == ()


def test_a_scale_that_all_channels_share_is_stored_once(tmp_path: Path) -> None:
    alike, apart = (stack(4, mid_rise=False, per_channel=c, negated=False) for c in (False, True))
    scales = information_size(apart) - information_size(alike)
    assert scales == 4 * (2 * 63 + 399)
    sizes = [write(graph, tmp_path, pack=True).stat().st_size for graph in (alike, apart)]
    assert scales - 3 * 80 < sizes[1] - sizes[0] < scales


def test_what_was_not_folded_is_reported(tmp_path: Path) -> None:
    model = onnx.load(write(stack(3, mid_rise=False), tmp_path, pack=True))
    coverage = measure(model, model)
    counts = Counter(line for line in coverage.unfolded if line.endswith(" of conv"))
    assert counts["Gather of conv"] == counts["Reshape of conv"] == 2  # planes of 2 bits and of 1
    assert counts["Add of conv"] == 2  # of the planes, and with the shift
    assert counts["Mul of conv"] == 1  # the bias's scale
    assert {line.split(" of ")[1] for line in coverage.unfolded} >= {"conv", "grouped", "wide"}
    assert measure(model, model, fusing=False).unfolded == ()


def test_layers_too_small_to_gain_stay_bytes(tmp_path: Path) -> None:
    assert plan(vector(), PACKED_BITS, None) == {}
    paths = [write(vector(), tmp_path, pack=pack) for pack in (True, None, False)]
    assert len({path.read_bytes() for path in paths}) == 1


def test_tables_that_cost_more_than_they_save_are_not_written() -> None:
    """One layer of 1 bit saves some hundred bytes, and its table takes 2,048."""
    graph = stack(1, mid_rise=True, channels=34, kernel=1, negated=False)
    small = [node for node in graph.nodes if node.name == "conv"]
    packed = pack(small[0].weight)  # type: ignore[attr-defined]
    assert packed is not None
    assert 0 < packed.saving < 2048
    assert plan(replace(graph, nodes=tuple(small)), PACKED_BITS, None) == {}
    assert set(plan(graph, PACKED_BITS, None)) >= {"conv", "grouped"}


def test_only_what_the_target_folds_is_packed() -> None:
    graph = stack(4, mid_rise=False)
    assert plan(graph, (), None) == plan(graph, {2}, None) == {}
    assert set(plan(graph, {4}, None)) == {"conv", "grouped", "wide"}


def test_the_opset_is_the_lowest_that_restores(tmp_path: Path) -> None:
    for bits, negated, wanted in ((4, False, 13), (4, True, 14), (3, False, 14)):
        path = write(stack(bits, mid_rise=False, negated=negated), tmp_path, pack=True)
        assert onnx.load(path).opset_import[0].version == wanted


def test_an_opset_that_cannot_restore_is_refused_or_left_alone(tmp_path: Path) -> None:
    graph = stack(3, mid_rise=False)
    with pytest.raises(ExportError, match=r"node 'conv': packed weights of 3 bits need opset 14"):
        write(graph, tmp_path, pack=True, opset=13)
    assert OnnxRuntime().open(write(graph, tmp_path, pack=None, opset=13)).coverage().packed == 0


@pytest.mark.parametrize(
    ("flags", "wanted"), [((), None), (("--pack",), True), (("--no-pack",), False)]
)
def test_the_command_line_asks_for_it(
    flags: tuple[str, ...], wanted: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(commands, "export", lambda path, **options: seen.append(options["pack"]))
    assert CliRunner().invoke(main, ["export", "m.onnx", *flags]).exit_code == 0
    assert seen == [wanted]


# -- through the interface ----------------------------------------------------------------------


class Plain:
    """An exporter of before there was packing."""

    name = "plain"
    summary = "bytes"
    runtime = "onnxruntime"
    placement = PlacementRules()

    def check(self, spec: QuantSpec) -> None:
        pass

    def export(self, graph: g.IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        raise AssertionError("not to be reached")


def digits_student(bits: int, method: str = "lsq") -> tuple[torch.fx.GraphModule, torch.Tensor]:
    """The network that the digits are trained with, on structured noise."""
    torch.manual_seed(1)
    pixels = network_images(96)[:, :1]
    teacher = build_model("resnet20", num_classes=10, in_channels=1)
    reestimate_batch_norm(teacher, pixels)
    side = TensorSpec(method=method, bits=bits)
    student = quantize(teacher, QuantSpec(weights=side, activations=side), example=(1, 8, 8))
    calibrate(student, pixels)
    snap_biases(student)
    return student, pixels


Digits: TypeAlias = tuple[torch.fx.GraphModule, torch.Tensor, ParityReport]


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """The 4-bit student, its images, and what its file's proof reports, for tests that read it."""
    student, pixels = digits_student(4)
    _, report = export_proven(student, tmp_path_factory.mktemp("digits") / "m.onnx", pixels)
    return student, pixels, report


@pytest.mark.parametrize(("bits", "method"), [(4, "lsq"), (3, "ewgs"), (2, "dorefa"), (1, "lsq")])
def test_the_digits_student_is_proven_packed(bits: int, method: str, tmp_path: Path) -> None:
    student, pixels = digits_student(bits, method)
    # One answer of 96 may be another, if every layer is right on its codes: on a Xeon it is at 3
    # bits, where the untrained student in float64 answers as the file, bit for bit.
    artifact, report = export_proven(student, tmp_path / "m.onnx", pixels)
    report.raise_for_failures()
    assert report.isolated
    assert (report.narrow_layers, report.byte_layers, report.float_layers) == (18, 3, 0)
    assert report.coverage.packed >= 16  # those of a few hundred weights would not gain
    assert report.coverage.unfolded == ()
    assert report.coverage.fallbacks == ()
    plain = export(student, tmp_path / "p.onnx", options=ExportOptions(pack=False))
    assert artifact.size == report.size < plain.size
    array = pixels.numpy()
    for optimize in (False, True):
        packed, wanted = (
            OnnxRuntime().open(p, optimize=optimize).run(array) for p in (artifact.path, plain.path)
        )
        np.testing.assert_array_equal(packed, wanted)
    lines = coverage_lines(report)
    assert f"packed: weights of {report.coverage.packed} of 18 layers below 8 bits" in lines[-2]
    assert "of weights at their bits, scales and biases" in lines[-1]


def test_a_target_that_cannot_restore_is_named(
    of_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _, _ = of_digits
    assert packs_of(OnnxRuntimeExporter()) == PACKED_BITS
    assert isinstance(OnnxRuntimeExporter(), PackingExporter)
    assert packs_of(Plain()) == frozenset()
    monkeypatch.setattr("sqakd_deploy.writing.get_exporter", lambda name: Plain())
    with pytest.raises(SpecError, match="target 'plain' does not restore packed weights at load"):
        export(student, tmp_path / "m.onnx", options=ExportOptions(pack=True))


def test_an_unfolded_node_shows_in_the_report(of_digits: Digits) -> None:
    _, _, report = of_digits
    coverage = replace(report.coverage, unfolded=("conv1/weight/t/Gather",))
    lines = coverage_lines(replace(report, coverage=coverage))
    assert "not folded at load, runs every time: conv1/weight/t/Gather" in lines


@pytest.mark.parametrize(
    ("whole", "floats", "said"),
    [
        (2, 0, "layers below 8 bits; the others a byte each"),
        (0, 0, "layers below 8 bits"),
        (0, 2, "layers below 8 bits; 2 in float"),
        (1, 2, "layers below 8 bits; 1 a byte each; 2 in float"),
        (None, None, "layers below 8 bits"),  # an older reference's
    ],
)
def test_layers_in_float_take_no_byte(
    whole: int | None, floats: int | None, said: str, of_digits: Digits
) -> None:
    _, _, report = of_digits
    coverage = replace(report.coverage, packed=report.narrow_layers or 0)
    lines = coverage_lines(
        replace(report, coverage=coverage, byte_layers=whole, float_layers=floats)
    )
    (packed,) = [line for line in lines if line.startswith("packed")]
    assert packed.endswith(said)


def test_where_nothing_is_packed_weights_are_bytes(of_digits: Digits) -> None:
    """As in files for OpenVINO at 8 bits, whose first and last layers have 7."""
    _, _, report = of_digits
    coverage = replace(report.coverage, packed=0)
    for narrow, floats, said in (
        (1, 0, "1 layer below 8 bits"),
        (2, 3, "2 layers below 8 bits; 3 in float"),
    ):
        bare = replace(report, coverage=coverage, narrow_layers=narrow, float_layers=floats)
        lines = coverage_lines(bare)
        assert f"weights: a byte each, also in {said}" in lines
        assert not any(line.startswith("packed") for line in lines)


def test_one_image_is_one_image(of_digits: Digits) -> None:
    _, _, report = of_digits
    text = str(replace(report, samples=1, ties=1))
    assert "Parity on 1 image " in text
    assert "1 image alone: what" in text
    assert "logits tie in 1 image: any" in text


def test_sizes_of_an_older_reference_are_read(of_digits: Digits, tmp_path: Path) -> None:
    student, pixels, _ = of_digits
    reference = reference_of(student, [pixels])
    save_reference(reference, tmp_path / "new.npz")
    assert load_reference(tmp_path / "new.npz").sizes == reference.sizes
    with np.load(tmp_path / "new.npz") as stored:
        older = {**stored, "sizes": stored["sizes"][:3]}
    np.savez(tmp_path / "old.npz", **older)
    sizes = load_reference(tmp_path / "old.npz").sizes
    assert sizes is not None
    assert (sizes.narrow_layers, sizes.byte_layers, sizes.float_layers) == (18, None, None)


def test_where_rules_are_explained_is_said_once(of_digits: Digits) -> None:
    _, _, report = of_digits
    for reason, times in (("its weights are float (rule 1)", 1), ("excluded", 0)):
        fallbacks = (FloatFallback("a", "Conv", reason), FloatFallback("b", "Gemm", reason))
        lines = coverage_lines(
            replace(report, coverage=replace(report.coverage, fallbacks=fallbacks))
        )
        assert sum("docs/runtime-rules.md" in line for line in lines) == times

"""Convolutions of images in forms that are fast, and proofs of files that have them."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_graphs import UINT8, Builder, images
from onnx import numpy_helper
from reference_executor import logits
from sqakd_exporters import onnxruntime, stems
from sqakd_exporters.onnxruntime import OnnxRuntime, OnnxRuntimeExporter
from sqakd_exporters.stems import with_fast_stems
from torch import nn

from sqakd_deploy import graph as g
from sqakd_deploy.api import export, export_proven
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.verification import rearranged
from sqakd_deploy.verification.comparing import compare_with_student
from sqakd_deploy.verification.constants import constants_of
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.saturation import saturation_in, saturation_of


def stem(channels: int = 3, outputs: int = 8, size: int = 32, **options: object) -> g.IntegerGraph:
    builder = Builder(shape=(channels, size, int(options.pop("width", size))))  # type: ignore[call-overload]
    codes = builder.quantize("image", "x", UINT8, 117)
    kernel = int(options.pop("kernel", 3))  # type: ignore[call-overload]
    read = builder.conv("stem", codes, outputs, kernel, **{"bits": 8, **options})
    active = builder.quantize("stem_quant", builder.relu("relu", read), UINT8)
    return builder.graph(builder.pool_and_classify(active))


def form(graph: g.IntegerGraph) -> str:
    """What a graph's convolution becomes."""
    kinds = {type(node) for node in with_fast_stems(graph).nodes}
    if g.Transpose in kinds:
        return "pairs" if g.Pad in kinds else "blocks"
    return "filled" if g.Pad in kinds else "as it is"


def conv_in(graph: g.IntegerGraph) -> g.Conv:
    (conv,) = [node for node in graph.nodes if isinstance(node, g.Conv)]
    return conv


FILLED: list[dict[str, object]] = [
    {},
    {"channels": 1},
    {"channels": 2, "stride": (2, 2), "size": 60},
    {"kernel": 5, "dilation": (2, 2), "padding": (4, 4, 4, 4)},
    {"kernel": 4, "padding": (0, 1, 2, 1)},
    {"kernel": 5, "stride": (2, 2), "size": 63},
    {"kernel": 5, "stride": (2, 1), "size": 60},
    {"bits": 4, "bias": None},
    {"bits": 2, "mid_rise": True},
    {"bits": 1, "mid_rise": True},
    {"kernel": 5, "stride": (2, 2), "size": 64, "bits": 4, "mid_rise": True},
    {"kernel": 5, "stride": (5, 5), "size": 140},
    {"channels": 1, "stride": (6, 5), "size": 168, "width": 140},
]
BLOCKS: list[dict[str, object]] = [
    {"kernel": 7, "padding": (3, 3, 3, 3)},
    {"kernel": 7, "padding": (0, 0, 0, 0)},
    {"kernel": 7, "padding": (2, 3, 4, 1), "channels": 1},
    {"kernel": 4, "padding": (1, 1, 1, 1), "channels": 2},
    {"kernel": 5, "padding": (2, 2, 2, 2), "width": 72, "bits": 4},
    {"kernel": 6, "padding": (2, 0, 2, 1), "bits": 2, "bias": None},
    {"kernel": 9, "padding": (4, 4, 4, 4)},
    {"kernel": 5, "padding": (1, 0, 0, 3), "width": 60},
]
BLOCKS = [{"stride": (2, 2), "size": 62, **options} for options in BLOCKS]
PAIRS: list[dict[str, object]] = [
    {"padding": (1, 1, 1, 1)},
    {"padding": (0, 0, 0, 0), "bits": 4},
    {"padding": (2, 0, 1, 3), "width": 70, "bias": None},
    {"kernel": 2, "padding": (0, 0, 0, 0), "bits": 2},
]
PAIRS = [{"stride": (2, 2), "size": 60, **options} for options in PAIRS]


@pytest.mark.parametrize("pack", [False, None])
@pytest.mark.parametrize("options", [*FILLED, *BLOCKS, *PAIRS], ids=str)
def test_the_faster_form_changes_no_answer(
    options: dict[str, object], pack: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and to its constants the file is what it was."""
    graph = stem(**dict(options))  # type: ignore[arg-type]
    kinds = {"blocks": BLOCKS, "pairs": PAIRS, "filled": FILLED}
    assert [form(graph)] == [kind for kind, known in kinds.items() if options in known]
    array = images(12, graph.values["x"].shape[1:], seed=5)  # type: ignore[arg-type]

    def answers(name: str, optimize: bool) -> np.ndarray:
        path = tmp_path / f"{name}.onnx"
        OnnxRuntimeExporter().export(graph, path, ExportOptions(pack=pack))
        session = OnnxRuntime().open(path, optimize=optimize)
        assert dict(session.coverage().integer) == (
            {"Conv": 1, "GlobalAveragePool": 1, "Gemm": 1} if optimize else {}
        )
        assert compare_with_student(QdqFile(path), constants_of(graph)) == []
        return session.run(array)

    faster = [answers("faster", optimize) for optimize in (False, True)]
    monkeypatch.setattr(onnxruntime, "with_fast_stems", lambda graph: graph)
    as_it_was = [answers("plain", optimize) for optimize in (False, True)]
    assert np.abs(faster[0] - as_it_was[0]).max() < 1e-4 * np.ptp(as_it_was[0])  # float sums
    np.testing.assert_array_equal(faster[1], as_it_was[1])
    expected = logits(graph, array)
    assert np.abs(faster[1] - expected).max() < 1e-4 * np.ptp(expected)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(*[st.integers(1, 9)] * 2),
    padding=st.tuples(*[st.integers(0, 5)] * 4),
    halves=st.tuples(*[st.integers(5, 8)] * 2),
    channels=st.integers(1, 3),
)
def test_any_kernel_is_the_same_in_blocks_and_pairs(
    kernel: tuple[int, int],
    padding: tuple[int, int, int, int],
    halves: tuple[int, int],
    channels: int,
) -> None:
    """Against sums in numpy, on small images."""
    random = np.random.default_rng(sum(kernel) + sum(padding))
    rows, columns = (2 * half for half in halves)
    image = random.integers(-9, 10, (1, channels, rows, columns)).astype(np.int64)
    codes = random.integers(-9, 10, (2, channels, *kernel)).astype(np.int8)
    weight = g.IntWeight(codes, np.ones(2, np.float32), 8, False)
    conv = g.Conv("conv", ("x",), "y", weight, None, (2, 2), padding, (1, 1), 1)
    wanted = convolved(image, conv)
    grid = g.Grid(np.float32(1), 0, -128, 127)
    values = {
        "x": g.Value("x", (None, *image.shape[1:]), grid),
        "y": g.Value("y", (None, *wanted.shape[1:])),
    }
    for form, stride in ((stems._in_blocks, (1, 1)), (stems._in_pairs, (1, 2))):
        *moves, made = form(conv, weight, values)
        assert isinstance(made, g.Conv)
        assert made.stride == stride
        assert min(made.padding) >= 0
        moved = image
        for move in moves:
            if isinstance(move, g.Pad):  # behind the channels
                moved = np.pad(moved, ((0, 0), (0, move.after[1]), (0, 0), (0, 0)))
            elif isinstance(move, g.Transpose):
                moved = moved.transpose(move.perm)
            moved = moved.reshape(1, *(extent or 0 for extent in values[move.output].shape[1:]))
        np.testing.assert_array_equal(convolved(moved, made), wanted)


def convolved(image: np.ndarray, conv: g.Conv) -> np.ndarray:
    """Sums of products ``(N, O, oH, oW)``, one shift of the kernel at a time."""
    assert isinstance(conv.weight, g.IntWeight)
    top, left, bottom, right = conv.padding
    padded = np.pad(image, ((0, 0), (0, 0), (top, bottom), (left, right)))
    codes = conv.weight.codes.astype(np.int64)
    down, across = (
        (extent - size) // step + 1
        for extent, size, step in zip(padded.shape[2:], codes.shape[2:], conv.stride, strict=True)
    )
    total = np.zeros((len(image), len(codes), down, across), np.int64)
    for i in range(codes.shape[2]):
        for j in range(codes.shape[3]):
            part = padded[:, :, i :: conv.stride[0], j :: conv.stride[1]][:, :, :down, :across]
            total += np.einsum("nchw,oc->nohw", part, codes[:, :, i, j])
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"size": 27},  # small images
        {"kernel": 7, "stride": (2, 2), "size": 54},
        {"channels": 4},
        {"channels": 6},
        {"channels": 3, "outputs": 9, "groups": 3},
        {"kernel": 1},
        {"kernel": 7},
        {"kernel": 7, "stride": (2, 2), "size": 61},
        {"kernel": 7, "stride": (2, 2), "size": 62, "mid_rise": True, "bits": 4},
        {"floats": True},
    ],
    ids=str,
)
def test_convolutions_that_gain_nothing_stay(options: dict[str, object]) -> None:
    assert form(stem(**options)) == "as it is"  # type: ignore[arg-type]


def test_weights_of_nothing_are_codes_of_the_grid() -> None:
    """Those of a channel that is switched off are zero with all others of it."""
    for options in ({"bits": 4}, {"bits": 2, "mid_rise": True}):
        graph = stem(**options)  # type: ignore[arg-type]
        weight = conv_in(graph).weight
        assert isinstance(weight, g.IntWeight)
        weight.codes[5] = 0
        made = conv_in(with_fast_stems(graph)).weight
        assert isinstance(made, g.IntWeight)
        np.testing.assert_array_equal(made.codes[:, :3], weight.codes)
        alive = np.abs(made.codes[np.arange(8) != 5, 3:])
        assert (alive == ("mid_rise" in options)).all()
        assert not made.codes[5].any()


def test_each_convolution_of_an_image_has_a_form_of_its_own(tmp_path: Path) -> None:
    builder = Builder(shape=(3, 64, 64))
    codes = builder.quantize("image", "x", UINT8, 117)
    stride = {"stride": (2, 2)}
    both = [builder.conv(name, codes, 8, kernel, **stride) for name, kernel in (("a", 3), ("b", 7))]
    total = builder.append(g.Add, "sum", *both)
    graph = builder.graph(builder.pool_and_classify(builder.quantize("out", total, UINT8, 128)))
    path = OnnxRuntimeExporter().export(graph, tmp_path / "m.onnx", ExportOptions()).path
    shapes = [QdqFile(path).constants[name]["weight codes"].shape[1:] for name in ("a", "b")]
    assert shapes == [(8, 2, 3), (12, 4, 4)]
    assert compare_with_student(QdqFile(path), constants_of(graph)) == []


# -- proofs of such files -------------------------------------------------------------------------


class Stem(nn.Sequential):
    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, kernel, stride, padding=kernel // 2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )


def student(kernel: int, stride: int) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    sample = torch.randn(16, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    made = quantize(Stem(kernel, stride).eval(), example=sample[:1])
    calibrate(made, sample)
    return made.eval()


@pytest.fixture(scope="module")
def blocks() -> torch.fx.GraphModule:
    return student(7, 2)


@pytest.fixture(scope="module")
def filled() -> torch.fx.GraphModule:
    return student(3, 1)


@pytest.fixture(scope="module")
def pairs() -> torch.fx.GraphModule:
    return student(3, 2)


def changed(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change what a node's first constant, its attribute, or a constant of the name holds."""
    proto = onnx.load(path)
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    base, _, attribute = name.partition("@")
    node = next((node for node in proto.graph.node if node.name == base), None)
    if node is not None and attribute:
        before = {a.name: list(a.ints) for a in node.attribute}.get(attribute, [1, 1])
        left = [a for a in node.attribute if a.name != attribute]
        made = onnx.helper.make_attribute(attribute, change(np.array(before)).tolist())
        del node.attribute[:]
        node.attribute.extend([*left, made])
    else:  # a constant of its own: others may share it
        place = None if node is None else node.input[1]
        tensor = held[name if place is None else place]
        made = numpy_helper.from_array(change(numpy_helper.to_array(tensor)), f"{name}/changed")
        proto.graph.initializer.append(made)
        for reader in [node] if node is not None else proto.graph.node:
            reader.input[:] = [made.name if i == tensor.name else i for i in reader.input]
    onnx.save(proto, path)


ONE = np.int8(1)


def code_at(*place: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(codes: np.ndarray) -> np.ndarray:
        made = codes.copy()
        made[place] ^= ONE
        return made

    return change


@pytest.mark.parametrize(
    ("kind", "constant", "change", "wanted"),
    [
        (
            "blocks",
            "0/weight",
            code_at(5, 7, 2, 2),
            "weight codes: 1 of 1176 differ, the first at (5",
        ),
        ("blocks", "0/weight", code_at(5, 0, 0, 0), "arrangement"),  # beyond the kernel
        ("blocks", "0/rows_first@perm", lambda p: p * 0 + [0, 3, 1, 4, 2], "arrangement"),
        ("blocks", "0/pixels@perm", lambda p: p[[0, 2, 1, 3]], "arrangement"),
        ("blocks", "0@pads", lambda pads: pads[[2, 3, 0, 1]], "arrangement"),
        ("blocks", "0@pads", lambda pads: pads + 1, "arrangement"),
        ("blocks", "0/blocks", lambda shape: shape[[0, 1, 3, 2]], "arrangement"),
        (
            "pairs",
            "0/weight",
            code_at(5, 4, 1, 2),
            "weight codes: 1 of 216 differ, the first at (5",
        ),
        ("pairs", "0/weight", code_at(5, 0, 0, 0), "arrangement"),
        ("pairs", "0/rows_first@perm", lambda p: p * 0 + [0, 3, 1, 4, 2], "arrangement"),
        ("pairs", "0@pads", lambda pads: pads[[2, 3, 0, 1]], "arrangement"),
    ],
)
def test_faults_in_what_is_moved_are_found(
    kind: str,
    constant: str,
    change: Callable[[np.ndarray], np.ndarray],
    wanted: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    made = request.getfixturevalue(kind)
    path = export(made, tmp_path / "m.onnx", options=ExportOptions(pack=False)).path
    expected, shape = constants_of(lower(made)), {"blocks": (8, 12, 4, 4), "pairs": (8, 8, 2, 3)}
    assert QdqFile(path).constants["0"]["weight codes"].shape == shape[kind]
    assert compare_with_student(QdqFile(path), expected) == []
    changed(path, constant, change)
    (difference,) = compare_with_student(QdqFile(path), expected)
    assert str(difference).startswith(f"0: {wanted}")


@pytest.mark.parametrize(
    ("constant", "change", "wanted"),
    [
        ("0/weight", code_at(3, 2, 1, 1), "0: weight codes: 1 of 216 differ, the first at (3, 2, "),
        ("0/weight", code_at(3, 3, 1, 1), None),  # multiplies nothing
        ("0/fill", lambda amounts: np.roll(amounts, -4), "0: weight codes: "),  # in front
        ("0/fill", lambda amounts: amounts + np.eye(8, dtype=np.int64)[6], "0: arrangement"),
        ("0@pads", lambda pads: pads + np.array([1, 0, -1, 0]), "0: arrangement"),
    ],
)
def test_faults_in_what_is_filled_are_found(
    constant: str,
    change: Callable[[np.ndarray], np.ndarray],
    wanted: str | None,
    filled: torch.fx.GraphModule,
    tmp_path: Path,
) -> None:
    path = export(filled, tmp_path / "m.onnx", options=ExportOptions(pack=False)).path
    expected = constants_of(lower(filled))
    changed(path, constant, change)
    found = [str(difference) for difference in compare_with_student(QdqFile(path), expected)]
    assert [line.startswith(wanted or "") for line in found] == [True] * (wanted is not None)


def proto_of(student: torch.fx.GraphModule, folder: Path) -> tuple[onnx.ModelProto, Path]:
    path = export(student, folder / "m.onnx", options=ExportOptions(pack=False)).path
    return onnx.load(path), path


def named(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.name == name)


def held(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def add(proto: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def differences(
    student: torch.fx.GraphModule, proto: onnx.ModelProto, path: Path, **without: str
) -> list[str]:
    onnx.save(proto, path)
    expected = {
        name: {k: v for k, v in facts.items() if k not in without.values()}
        for name, facts in constants_of(lower(student)).items()
    }
    return [str(difference) for difference in compare_with_student(QdqFile(path), expected)]


def test_another_filler_is_found(filled: torch.fx.GraphModule, tmp_path: Path) -> None:
    proto, path = proto_of(filled, tmp_path)
    pad = named(proto, "0/fill")
    pad.input[2] = add(proto, "other", held(proto, pad.input[2]) + np.uint8(1))
    assert differences(filled, proto, path)[0].startswith("0: arrangement of what it reads")


@pytest.mark.parametrize("kind", ["blocks", "filled", "pairs"])
def test_weights_of_another_type_do_not_wrap(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = request.getfixturevalue(kind)
    proto, path = proto_of(made, tmp_path)
    reader = next(n for n in proto.graph.node if n.output[0] == named(proto, "0").input[1])
    for place, name in ((0, "codes"), (2, "zero")):
        reader.input[place] = add(proto, name, held(proto, reader.input[place]).view(np.uint8))
    (found,) = differences(made, proto, path)
    assert found.startswith("0: weight codes: ")
    assert found.endswith(" in the student")


@pytest.mark.parametrize("kind", ["blocks", "filled", "pairs"])
def test_a_file_of_another_width_is_named_so(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    proto, path = proto_of(request.getfixturevalue(kind), tmp_path)
    onnx.save(proto, path)
    file, layer = QdqFile(path), constants_of(lower(request.getfixturevalue(kind)))["0"]
    wide = np.repeat(layer["weight codes"], 2, axis=0)
    found = compare_with_student(file, {"0": {**layer, "weight codes": wide}})
    assert any("wanted shape (16, 3, " in str(difference) for difference in found)


def test_references_that_state_no_padding_are_compared(
    filled: torch.fx.GraphModule, tmp_path: Path
) -> None:
    proto, path = proto_of(filled, tmp_path)
    found = differences(filled, proto, path, older="padding", too="dilation")
    assert any("wanted shape (8, 3, 3, 3), the file has (8, 4, 3, 3)" in line for line in found)


def test_another_operator_is_no_convolution(filled: torch.fx.GraphModule, tmp_path: Path) -> None:
    """Its kernel is turned, and its answers have the same shape."""
    proto, path = proto_of(filled, tmp_path)
    conv = named(proto, "0")
    reader = next(n for n in proto.graph.node if n.output[0] == conv.input[1])
    conv.op_type = "ConvTranspose"
    reader.input[0] = add(proto, "turned", held(proto, reader.input[0]).swapaxes(0, 1))
    next(a for a in reader.attribute if a.name == "axis").i = 1
    assert any(line.startswith("0: ") for line in differences(filled, proto, path))


def test_a_node_behind_the_moves_is_not_passed_over(
    filled: torch.fx.GraphModule, tmp_path: Path
) -> None:
    proto, path = proto_of(filled, tmp_path)
    conv = named(proto, "0")
    turn = onnx.helper.make_node("Transpose", [conv.input[0]], ["t"], "turn", perm=[0, 1, 3, 2])
    proto.graph.node.insert(list(proto.graph.node).index(conv), turn)
    conv.input[0] = "t"
    assert any("wanted shape" in line for line in differences(filled, proto, path))


def test_pads_may_state_their_axes(filled: torch.fx.GraphModule, tmp_path: Path) -> None:
    proto, path = proto_of(filled, tmp_path)
    pad = named(proto, "0/fill")
    pad.input[1] = add(proto, "amounts", np.array([0, 1]))
    pad.input.append(add(proto, "axes", np.array([1])))
    proto.opset_import[0].version = 18
    assert differences(filled, proto, path) == []
    pad.input[2] = ""  # zero, which is not the zero-point
    assert differences(filled, proto, path)[0].startswith("0: arrangement of what it reads")


@pytest.mark.parametrize("fault", ["no shape", "negative padding", "no stride", "lost constant"])
def test_files_that_cannot_be_followed_are_named(
    fault: str, filled: torch.fx.GraphModule, tmp_path: Path
) -> None:
    proto, path = proto_of(filled, tmp_path)
    conv, pad = named(proto, "0"), named(proto, "0/fill")
    if fault == "no shape":
        proto.graph.input[0].type.tensor_type.ClearField("shape")
    elif fault == "lost constant":
        pad.input[1] = proto.graph.input[0].name
    else:
        name, value = ("pads", [-1, 1, 3, 1]) if "pad" in fault else ("strides", [0, 1])
        left = [a for a in conv.attribute if a.name != name]
        del conv.attribute[:]
        conv.attribute.extend([*left, onnx.helper.make_attribute(name, value)])
    assert any("0: arrangement" in line for line in differences(filled, proto, path))


def test_large_images_are_followed_row_by_row() -> None:
    """A row of digests for each weight; the rows themselves would be 100 MB."""
    image = np.arange(1, 1 + 512 * 512, dtype=np.int32).reshape(1, 1, 512, 512)
    window = rearranged._Window((5, 5), (2, 2, 2, 2), (1, 1), (1, 1))
    read = window.outputs(image)
    assert read is not None
    tracemalloc.start()
    assert len(set(rearranged._rows(read))) == 25
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_saturation_is_decided_by_the_weights_that_there_are(
    blocks: torch.fx.GraphModule, tmp_path: Path
) -> None:
    path = export(blocks, tmp_path / "m.onnx").path
    layers = {layer.layer: layer for layer in saturation_of(QdqFile(path)).layers}
    in_student = {layer.layer: layer for layer in saturation_in(lower(blocks)).layers}
    assert layers["0"].pair == in_student["0"].pair


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("mean", "says"),
    [((0.0, 0.0, 0.0), "pixels are the codes"), ((0.1, 0.2, 0.3), "stays as float nodes")],
    ids=["codes", "nodes"],
)
@pytest.mark.parametrize("kind", ["blocks", "filled", "pairs"])
def test_raw_pixels_are_moved_as_well(
    kind: str,
    layout: Literal["nchw", "nhwc"],
    mean: tuple[float, ...],
    says: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    preprocessing = Preprocessing(channels=3, input_size=(56, 56), mean=mean, std=(1.0,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 3, 56, 56), dtype=np.uint8)
    prepared = torch.from_numpy(preprocessing.apply(pixels))
    made = copy.deepcopy(request.getfixturevalue(kind))
    calibrate(made, [prepared])
    artifact, report = export_proven(
        made,
        tmp_path / "m.onnx",
        prepared,
        options=ExportOptions(input_type="uint8", input_layout=layout, batch=8),
        metadata={"sqakd.preprocessing": preprocessing.model_dump_json()},
    )
    assert says in artifact.input_form
    assert report.failures == []
    names = {node.name for node in onnx.load(artifact.path).graph.node}
    assert ("0/fill" in names, "0/rows" in names) == (kind != "blocks", kind != "filled")

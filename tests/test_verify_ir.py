"""OpenVINO IR against a conversion of its student: right files, faults, and what is not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from networks import SHAPE, exact_here, network
from networks import images as photos
from small_network import SMALL
from torch import Tensor, fx, nn

from sqakd_deploy.api import export, export_proven
from sqakd_deploy.cli import main
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.errors import ExportError, ParityError
from sqakd_deploy.exporting import ExportOptions
from sqakd_deploy.lowering.integer import snap_biases
from sqakd_deploy.pixels import INPUT_KEY, PREPROCESSING_KEY
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec, TensorSpec
from sqakd_deploy.verification.converting import converter_of
from sqakd_deploy.verification.isolating import isolator_of
from sqakd_deploy.verification.layer_tables import layers_lines
from sqakd_deploy.verification.reading import read_file
from sqakd_deploy.verification.student import record, reference_of
from sqakd_deploy.verification.tables import constants_lines
from sqakd_deploy.verification.verifying import Verification, verify_file

pytest.importorskip("openvino")


class Separable(nn.Module):
    """MobileNet's: a depthwise convolution, hard-swish, squeeze-and-excite, a skip; a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish())
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.project = nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 2)
        x = nn.functional.hardswish(self.depthwise(x))
        gate = nn.functional.hardsigmoid(self.squeeze(x.mean([2, 3], keepdim=True)))
        x = x + self.project(x * gate)
        return self.classifier(x.mean([2, 3]))


class Vision(nn.Module):
    """A transformer's: patches, class token, positions, attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 17, 12))
        self.norm, self.last_norm = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], 12, 16).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.last_norm(x))))
        return self.head(x[:, 0])


def trained(model: nn.Module, bits: int = 4, given: Tensor | None = None) -> fx.GraphModule:
    spec = QuantSpec(target="openvino", weights=TensorSpec(bits=bits))
    student = quantize(model, exact_here(spec), example=SHAPE)
    calibrate(student, photos(32) if given is None else given)
    snap_biases(student)
    return student


@pytest.fixture(scope="module")
def students() -> dict[str, fx.GraphModule]:
    torch.manual_seed(0)
    models = {name: network(name) for name in ("residual", "mixed")}
    return {name: trained(m) for name, m in (models | {"separable": Separable().eval()}).items()}


def verified(student: fx.GraphModule, path: Path, **options: object) -> Verification:
    known = {"isolator": isolator_of(student), "converter": converter_of(student)}
    reference = reference_of(student, [photos(8)])
    return verify_file(path, reference, others={}, **(known | options))  # type: ignore[arg-type]


# -- right files -----------------------------------------------------------------------------------

MEAN = Preprocessing(input_size=SHAPE[1:], channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
PLAIN = Preprocessing(input_size=SHAPE[1:], channels=3, mean=(0, 0, 0), std=(1, 1, 1))


def proven(student: fx.GraphModule, path: Path, given: Tensor, **options: object) -> None:
    artifact, report = export_proven(student, path, given, **options)  # type: ignore[arg-type]
    assert report.failures == []
    assert report.constants == ()
    for isolated in report.isolated.values():
        assert isolated.decides  # one copy hands out all, though its answers may differ by noise
        assert len(isolated.tensors) >= 5
    assert artifact.path == path


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_packed_students_are_proven(bits: int, tmp_path: Path) -> None:
    proven(trained(network("residual"), bits), tmp_path / "m.xml", photos(8))


def test_families_are_proven(students: dict[str, fx.GraphModule], tmp_path: Path) -> None:
    torch.manual_seed(0)
    for student in (students["separable"], trained(Vision().eval())):
        proven(student, tmp_path / "m.xml", photos(8))


@pytest.mark.parametrize(
    "options",
    [
        {"pack": False, "opset": 21},
        {"input_name": "image", "output_name": "scores", "batch": 4},
    ],
    ids=["opset", "names"],
)
def test_options_are_repeated(
    options: dict[str, object], students: dict[str, fx.GraphModule], tmp_path: Path
) -> None:
    how = ExportOptions(**options)  # type: ignore[arg-type]
    proven(students["mixed"], tmp_path / "m.xml", photos(8), options=how, metadata={"who": "me"})


@pytest.mark.parametrize(
    ("stated", "layout", "form"),
    [(MEAN, "nchw", "nodes"), (MEAN, "nhwc", "nodes"), (PLAIN, "nchw", "folded")],
)
def test_files_for_pixels_are_proven(
    stated: Preprocessing, layout: str, form: str, tmp_path: Path
) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8).repeat(3, axis=1)
    random = np.random.default_rng(0).integers(0, 256, (16, *SHAPE), dtype=np.uint8)
    given = torch.from_numpy(stated.apply(np.concatenate([every, random])))
    how = ExportOptions(input_type="uint8", input_layout=layout)  # type: ignore[arg-type]
    facts = {PREPROCESSING_KEY: stated.model_dump_json()}
    path = tmp_path / "m.xml"
    proven(trained(network("residual"), given=given), path, given[:8], options=how, metadata=facts)
    taken = read_file(path).stated(INPUT_KEY)
    assert isinstance(taken, dict)
    assert (taken["normalisation"], taken["layout"]) == (form, layout.upper())


# -- planted faults --------------------------------------------------------------------------------

Change: TypeAlias = Callable[["Ir"], None]


class Ir:
    """A file to be changed: its net, and the bytes of its constants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.net = ElementTree.parse(path).getroot()
        self.weights = bytearray(path.with_suffix(".bin").read_bytes())

    def layer(self, name: str) -> Element:
        (found,) = self.net.findall(f"layers/layer[@name='{name}']")
        return found

    def before(self, layer: Element, port: int = 0) -> Element:
        reads = f"edges/edge[@to-layer='{layer.get('id')}'][@to-port='{port}']"
        source = self.net.find(reads).get("from-layer")  # type: ignore[union-attr]
        return self.net.find(f"layers/layer[@id='{source}']")  # type: ignore[return-value]

    def constant(self, name: str, *ports: int) -> Element:
        """The constant that is reached from a layer's ports, one after another."""
        layer = self.layer(name)
        for port in ports:
            layer = self.before(layer, port)
        while layer.get("type") == "Convert":
            layer = self.before(layer)
        assert layer.get("type") == "Const"
        return layer

    def replace(self, constant: Element, kind: str, change: Callable[[np.ndarray], None]) -> None:
        """Give a constant numbers of its own: OpenVINO stores equal ones once."""
        data = constant.find("data")
        assert data is not None
        first, size = int(data.attrib["offset"]), int(data.attrib["size"])
        numbers = np.frombuffer(self.weights[first : first + size], kind).copy()
        change(numbers)
        self.weights += bytes(-len(self.weights) % 64)
        data.attrib["offset"] = str(len(self.weights))
        self.weights += numbers.tobytes()

    def save(self) -> None:
        ElementTree.ElementTree(self.net).write(self.path)
        self.path.with_suffix(".bin").write_bytes(self.weights)


def constant(kind: str, by: float, *place: object) -> Change:
    def change(numbers: np.ndarray) -> None:
        numbers[0] += by if by >= 1 else numbers[0] * by

    def plant(ir: Ir) -> None:
        ir.replace(ir.constant(*place), kind, change)  # type: ignore[arg-type]

    return plant


def exchanged(numbers: np.ndarray) -> None:
    rows = numbers.reshape(8, 3, 9)
    rows[:, [0, 2]] = rows[:, [2, 0]]


def attribute(layer: str, **values: str) -> Change:
    def plant(ir: Ir) -> None:
        ir.layer(layer).find("data").attrib.update(values)  # type: ignore[union-attr]

    return plant


def other_operator(ir: Ir) -> None:
    ir.layer("add").set("type", "Subtract")


def other_inputs(ir: Ir) -> None:
    for edge in ir.net.findall(f"edges/edge[@to-layer='{ir.layer('cat_1').get('id')}']"):
        edge.set("to-port", "1" if edge.get("to-port") == "0" else "0")


def obeyed(ir: Ir) -> None:
    options = ElementTree.SubElement(ir.net.find("rt_info"), "runtime_options")  # type: ignore[arg-type]
    ElementTree.SubElement(options, "ACTIVATIONS_SCALE_FACTOR", value="8.0")


STEM, CONV1 = "stem/WithoutBiases", "conv1/WithoutBiases"
WEIGHTS = (STEM, 1, 0, 0)

FAULTS: dict[str, tuple[str, Change, str]] = {
    "weight code": (
        "residual",
        constant("i1", 1, *WEIGHTS),
        "stem: constant i8 (8, 3, 3, 3): 1 of",
    ),
    "packed codes": (
        "residual",
        constant("u1", 1, CONV1, 1, 0, 0, 0, 0, 1),
        "conv1: constant u8 (576): 1 of 576 differ, the first at 0: ",
    ),
    "exchanged channels": (
        "residual",
        lambda ir: ir.replace(ir.constant(*WEIGHTS), "i1", exchanged),
        "stem: constant i8 (8, 3, 3, 3): ",
    ),
    "scale": ("residual", constant("<f4", 1e-6, STEM, 1, 1, 0), "stem: constant f32 (8): 1 of 8"),
    "scale of the input": (
        "residual",
        constant("<f4", 0.01, CONV1, 0, 1),
        "conv1: constant f32 ()",
    ),
    "bias": ("residual", constant("<i4", 1, "stem", 1, 0, 0, 0), "stem: constant i32 (8): 1 of 8"),
    "bound": ("residual", constant("<f4", 0.01, "quant_x", 0, 2), "quant_x: constant f32 ()"),
    "bound of reals": ("residual", constant("<f4", 0.01, "relu_1", 0), "relu_1: constant f32 ()"),
    "padding": (
        "residual",
        attribute(STEM, pads_begin="2, 0", pads_end="0, 2"),
        "stem: pads_begin of Convolution: 2, 0 in the file, 1, 1 in the student",
    ),
    "levels": (
        "residual",
        lambda ir: attribute(ir.before(ir.layer("quant_x")).attrib["name"], levels="255")(ir),
        "quant_x: levels of FakeQuantize: 255 in the file, 256 in the student",
    ),
    "stride of a pool": (
        "separable",
        attribute("max_pool2d", strides="1, 1"),
        "max_pool2d: strides of MaxPool: 1, 1 in the file, 2, 2 in the student",
    ),
    "operator": (
        "residual",
        other_operator,
        "add: operator: Subtract in the file, Add in the student",
    ),
    "order of inputs": ("mixed", other_inputs, "cat_1: inputs of Concat: "),
    "what OpenVINO obeys": ("residual", obeyed, "runtime information: options: "),
}


@pytest.fixture(scope="module")
def files(
    students: dict[str, fx.GraphModule], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ir")
    return {name: export(s, folder / f"{name}.xml").path for name, s in students.items()}


def planted(path: Path, folder: Path, change: Change) -> Path:
    ir = Ir(path)
    change(ir)
    ir.path = folder / "m.xml"
    ir.save()
    return ir.path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_layer(
    fault: str, students: dict[str, fx.GraphModule], files: dict[str, Path], tmp_path: Path
) -> None:
    name, change, text = FAULTS[fault]
    file = read_file(planted(files[name], tmp_path, change))
    found = converter_of(students[name])(file).differences  # type: ignore[arg-type]
    assert str(found[0]).startswith(text)
    layer = text.partition(":")[0]
    assert {difference.layer for difference in found} == {layer} or fault == "bound of reals"


def test_a_faulty_file_fails(
    students: dict[str, fx.GraphModule], files: dict[str, Path], tmp_path: Path
) -> None:
    """Its answers hide the fault: no image comes near the bound of a dead channel, say."""
    path = planted(files["residual"], tmp_path, constant("<f4", 1e-6, STEM, 1, 1, 0))
    student = students["residual"]
    report = verified(student, path, layer_samples=4, recorder=partial(record, student))
    assert report.parity.exceeded == []
    with pytest.raises(ParityError, match=r"the file is not its student: stem: constant f32 \(8\)"):
        report.raise_for_failures()
    first, last = constants_lines(report.parity, unknown=report.unknown)
    assert first.startswith("wrong constant: stem: constant f32 (8): 1 of 8 differ")
    assert last.startswith("layers: not compared, since it is another graph than OpenVINO 2")


# -- what is not known -----------------------------------------------------------------------------


def test_layers_and_saturation_are_those_of_what_was_converted(
    students: dict[str, fx.GraphModule], files: dict[str, Path]
) -> None:
    student = students["residual"]
    recorder = partial(record, student)
    report = verified(student, files["residual"], layer_samples=2, recorder=recorder)
    assert report.failures == []
    assert report.layers is not None
    assert report.layers.tensors
    assert report.layers.missing == ()
    assert {layer.layer for layer in report.saturation.layers} >= {"stem", "classifier"}
    assert constants_lines(report.parity)[0] == "constants: all those of the student"
    assert layers_lines(report.layers)[0] == "no quantised tensor differs from the student's"


def test_a_saved_reference_tells_answers_alone(
    students: dict[str, fx.GraphModule], files: dict[str, Path]
) -> None:
    report = verified(students["residual"], files["residual"], converter=None, isolator=None)
    assert (report.failures, report.constants) == ([], None)
    assert constants_lines(report.parity, unknown=report.unknown) == [
        "constants and layers: not compared, since OpenVINO IR is held to a conversion of its run, "
        "and saved answers are no run"
    ]
    assert json.loads(json.dumps(report.to_dict()))["unknown"] == report.unknown


def restated(name: str, **facts: object) -> Change:
    """A change of what the metadata say."""

    def plant(ir: Ir) -> None:
        stated = ir.net.find(f"rt_info/sqakd/{name}")
        assert stated is not None
        stated.set("value", json.dumps(json.loads(stated.attrib["value"]) | facts))

    return plant


def both(*changes: Change) -> Change:
    return lambda ir: [change(ir) for change in changes] and None


def test_another_version_may_convert_otherwise(
    students: dict[str, fx.GraphModule], files: dict[str, Path], tmp_path: Path
) -> None:
    older = restated("conversion", version="0.0.1")
    convert = converter_of(students["residual"])
    same = convert(read_file(planted(files["residual"], tmp_path, older)))  # type: ignore[arg-type]
    assert (same.differences, same.unknown, same.file.known_form) == ((), None, True)
    changed = both(older, FAULTS["padding"][1])
    other = convert(read_file(planted(files["residual"], tmp_path, changed)))  # type: ignore[arg-type]
    assert (other.differences, other.file.known_form) == ((), False)
    assert other.unknown is not None
    assert "and sqakd-deploy 0.0.1, and OpenVINO 2" in other.unknown
    assert "(first: stem: pads_begin of Convolution" in other.unknown


def test_a_file_that_does_not_say_how_it_was_made(
    students: dict[str, fx.GraphModule], files: dict[str, Path], tmp_path: Path
) -> None:
    def silent(ir: Ir) -> None:
        own = ir.net.find("rt_info/sqakd")
        assert own is not None
        own.remove(own.find("conversion"))  # type: ignore[arg-type]

    for change in (silent, restated("input", type="int4"), restated("input", layout=None)):
        file = read_file(planted(files["residual"], tmp_path, change))
        found = converter_of(students["residual"])(file)  # type: ignore[arg-type]
        assert (found.differences, found.file) == ((), file)
        assert found.unknown == "the file does not say how it was converted"


def test_metadata_are_compared(
    students: dict[str, fx.GraphModule], files: dict[str, Path], tmp_path: Path
) -> None:
    path = planted(files["residual"], tmp_path, restated("input", range=[0, 255]))
    report = verified(students["residual"], path)
    assert report.failures[0].startswith("metadata sqakd.input: range: [0, 255] in the file")


@pytest.mark.parametrize(
    ("text", "why"), [("<net>", "no element found"), ("<net/>", "wanted one input and one output")]
)
def test_what_is_no_ir(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "m.xml").write_text(text)
    with pytest.raises(ExportError, match=f"m.xml is no OpenVINO IR that is read here: {why}"):
        read_file(tmp_path / "m.xml")


# -- the command line ------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_takes_ir(tmp_path: Path) -> None:
    path, folder, answers = tmp_path / "m.xml", tmp_path / "r", tmp_path / "answers.npz"
    options = ("--model", SMALL, "--epochs", 0, "--teacher-epochs", 1, "--target", "openvino")
    assert run("train", *options, "--output", folder).exit_code == 0
    known = ("--run", folder, "--samples", 16)
    exported = run("export", path, *known, "--save-reference", answers)
    assert exported.exit_code == 0, exported.output
    verification = run("verify", path, *known)
    assert verification.exit_code == 0, verification.output
    assert "took no part" not in verification.stdout  # runtimes of ONNX
    for result in (exported, verification):
        assert "constants: all those of the student\nlayers: " in result.stdout
    alone = run("verify", path, "--reference", answers)
    assert alone.exit_code == 0, alone.output
    assert "constants and layers: not compared, since OpenVINO IR is held to" in alone.stdout
    assert "saturat" not in alone.stdout
    planted(path, tmp_path, attribute(STEM, pads_begin="0, 2", pads_end="2, 0"))
    wrong = run("verify", path, *known)
    assert wrong.exit_code not in (0, 2)
    assert "wrong constant: stem: pads_begin of Convolution: 0, 2 in the file" in wrong.stdout

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from networks import SHAPE, images, network
from onnx import numpy_helper
from sqakd_exporters.onnxruntime import OnnxRuntime
from torch import nn

from sqakd_deploy.api import export, export_proven
from sqakd_deploy.errors import DataError, ExportError, ParityError, SpecError
from sqakd_deploy.evaluate import accuracy, agreement, divergence, predict
from sqakd_deploy.exporting import Coverage, ExportOptions
from sqakd_deploy.lowering import folding, integer
from sqakd_deploy.lowering.integer import lower, snap_biases
from sqakd_deploy.parity import (
    Tolerance,
    expected_size,
    float_size,
    information_size,
    output_step,
    verify,
)
from sqakd_deploy.quantization import (
    calibrate,
    quantize,
    reestimate_batch_norm,
    weight_quantizers,
)
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.verification import isolating
from sqakd_deploy.verification.isolated import SIMULATED, Isolated, IsolatedReport
from sqakd_deploy.verification.measures import answers
from sqakd_deploy.verification.running import Expected, Runs
from sqakd_deploy.verification.sizes import sizes_of
from sqakd_deploy.verification.stages import report_of
from sqakd_deploy.verification.student import reference_of
from sqakd_deploy.verification.tables import parity_lines


@pytest.fixture(scope="module")
def student() -> torch.fx.GraphModule:
    teacher = network("residual")
    reestimate_batch_norm(teacher, images(128))
    made = quantize(teacher, example=SHAPE)
    calibrate(made, images(128))
    snap_biases(made)
    return made


@pytest.fixture
def model(student: torch.fx.GraphModule, tmp_path: Path) -> Path:
    """Unpacked: the constants that faults are planted in keep their names."""
    options = ExportOptions(pack=False)
    return export(student, tmp_path / "model.onnx", options=options).path


def test_labels_of_other_images_are_refused(student: torch.fx.GraphModule, model: Path) -> None:
    with pytest.raises(DataError, match=r"^labels: wanted one for each of 8 images, got \(5,\)"):
        verify(model, student, images(8), labels=[0] * 5)


def test_a_report_reads_as_on_the_command_line(student: torch.fx.GraphModule, model: Path) -> None:
    """Its lines stand unbroken below the table, whose width is not theirs."""
    report = verify(model, student, images(8))
    title, *_ = lines = str(report).splitlines()
    assert title.rstrip() == "Parity on 8 images"
    names = "onnxruntime, optimisations off; onnxruntime, optimisations on"
    assert f"bit for bit the student's logits: {names}" in lines
    assert "8 images alone: what differs in one of a hundred may not be among them" in lines
    assert "constants: all those of the student" in lines
    assert repr(report).startswith("ParityReport(samples=8, ")


def change(path: Path, name: str, function: object) -> None:
    """Plant a fault: replace one initializer of a file."""
    proto = onnx.load(path)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    changed = function(numpy_helper.to_array(tensor).copy())  # type: ignore[operator]
    tensor.CopyFrom(numpy_helper.from_array(changed, name))
    onnx.save(proto, path)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "qonnx"])
def test_layers_with_bits_of_their_own_are_proven(target: str, tmp_path: Path) -> None:
    if target != "tensorrt":
        pytest.importorskip(target)
    spec = QuantSpec(target=target, layer_bits={"conv1": "w1a3", "conv2": "w2a6", "stem": "5"})
    teacher = network("residual")
    reestimate_batch_norm(teacher, images(128))
    made = quantize(teacher, spec, example=SHAPE)
    calibrate(made, images(128))
    snap_biases(made)
    artifact = export(made, tmp_path / "model.onnx")
    report = verify(artifact, made, images(32))
    report.raise_for_failures()
    assert max(stage.max_error for stage in report.stages) < 1e-3  # of logits in float, noise
    assert {q.bits for q in weight_quantizers(made).values()} >= {1, 2, 5}


def test_a_true_export_passes(student: torch.fx.GraphModule, model: Path) -> None:
    report = verify(model, student, images(256))
    report.raise_for_failures()
    assert [stage.name for stage in report.stages] == [
        "PyTorch student",
        "onnxruntime, optimisations off",
        "onnxruntime, optimisations on",
    ]
    assert report.stages[0].max_error == 0
    assert report.samples == 256
    assert report.size == model.stat().st_size
    assert all(stage.top1 is None for stage in report.stages)


def test_a_stage_opens_the_file_once(
    student: torch.fx.GraphModule, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a copy that answers its codes, too; what is the student's own is found once for both."""
    opened, run = [], []
    plain, init = OnnxRuntime.open, isolating._Isolator.__init__

    def counting(self: OnnxRuntime, path: Path, **options: Any) -> Any:
        opened.append((path == model, options["optimize"]))
        return plain(self, path, **options)

    def made(self: object, student: nn.Module, graph: object) -> None:
        run.append(student)
        init(self, student, graph)

    monkeypatch.setattr(OnnxRuntime, "open", counting)
    monkeypatch.setattr(isolating._Isolator, "__init__", made)
    assert not verify(model, student, images(8)).failures
    assert opened == [(True, False), (True, True), (False, False), (False, True)]
    assert len(run) == 1
    assert run[0] is student  # its biases are snapped: it needs no copy


def lowered_wrongly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a mistake where trained numbers become integers: files have it, and what they are
    compared with."""
    fold, with_bias = folding.fold, folding.with_bias

    def wrong_fold(*arguments: Any, **options: Any) -> Any:
        weight = fold(*arguments, **options)
        codes, scale = weight.codes.copy(), weight.scale.copy()
        if kind == "sign":
            codes[1] = -codes[1]
        if kind == "scale":
            scale[1] *= 1.05
        return replace(weight, codes=codes, scale=scale)

    def wrong_bias(weight: Any, bias: Any, scale: Any) -> Any:
        found, codes = with_bias(weight, bias, scale)
        return found, replace(codes, codes=codes.codes + np.int32(0.05 / codes.scale))

    monkeypatch.setattr(folding, "fold", wrong_fold)
    if kind == "bias":
        monkeypatch.setattr(integer, "with_bias", wrong_bias)
        monkeypatch.setattr(folding, "with_bias", wrong_bias)


@pytest.mark.parametrize("kind", ["sign", "scale", "bias"])
def test_wrong_integers_are_told_by_the_student_as_it_was_trained(
    kind: str, student: torch.fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered_wrongly(kind, monkeypatch)
    report = verify(export(student, tmp_path / "model.onnx"), student, images(64))
    # the file is what lowering made; what lowering made is not the student
    assert report.stages[-1].max_error == 0 or kind == "bias"
    assert report.failures
    wrong = [failure for failure in report.failures if f"({SIMULATED})" in failure]
    assert any("quant_relu" in failure for failure in wrong)
    with pytest.raises(ParityError, match="wrong on its own"):
        report.raise_for_failures()


def test_a_student_is_its_integers(student: torch.fx.GraphModule, model: Path) -> None:
    student.train()
    report = verify(model, student, images(64))
    assert student.training
    student.eval()
    simulated = report.isolated[SIMULATED]
    assert simulated.images == 8
    assert {part.name for part in simulated.tensors} >= {"quant_x", "quant_relu"}
    assert simulated.worst is not None
    assert simulated.worst.outside < 1e-4
    assert simulated.logits < 1e-2


def flip(codes: np.ndarray) -> np.ndarray:
    codes[3] = -codes[3]
    return codes


@pytest.mark.parametrize(
    ("constant", "fault"),
    [
        ("classifier/weight", flip),
        ("classifier/bias", lambda codes: codes + np.int32(2000)),
        ("quant_norm2/q/scale", lambda scale: scale * np.float32(1.5)),
        ("quant_norm/q/zero_point", lambda zero: zero + np.uint8(9)),
        ("clip_uint8_15", lambda bound: bound - np.uint8(8)),
        ("conv1/weight/scale", lambda scale: scale[::-1].copy()),
    ],
)
def test_a_planted_fault_is_seen(
    constant: str, fault: object, student: torch.fx.GraphModule, model: Path
) -> None:
    change(model, constant, fault)
    report = verify(model, student, images(256))
    assert max(stage.max_error for stage in report.stages[1:]) > 4
    assert max(stage.mean_error for stage in report.stages[1:]) > 0.5


def test_one_answer_for_all_images_is_said(student: torch.fx.GraphModule, model: Path) -> None:
    report = verify(model, student, images(1).expand(8, -1, -1, -1))
    assert report.answers == 1
    assert "all images get one answer" in " ".join(parity_lines(report))
    several = verify(model, student, images(64))
    assert several.answers > 1
    assert "one answer" not in " ".join(parity_lines(several))


def test_a_wrong_last_scale_changes_no_answer_and_fails(
    student: torch.fx.GraphModule, model: Path
) -> None:
    """Both by the constant and by what the logits are off."""
    change(model, "quant_classifier/dq/scale", lambda scale: scale * np.float32(3))
    report = verify(model, student, images(256))
    assert all(stage.agreement == 100.0 for stage in report.stages)
    assert [str(d).split(":")[0] for d in report.constants or ()] == ["quant_classifier"]
    assert any("wrong on their own: logits" in failure for failure in report.failures)
    unknown = replace(report, constants=None, isolated={})
    assert [failure.split(":")[0] for failure in unknown.failures] == [
        "onnxruntime, optimisations off",
        "onnxruntime, optimisations on",
    ]
    assert all("steps in the mean, more than 4.00" in failure for failure in unknown.failures)
    assert not replace(unknown, tolerance=Tolerance(mean_error=1e3)).failures


def test_an_error_that_is_no_number_fails(student: torch.fx.GraphModule, model: Path) -> None:
    report = verify(model, student, images(8))
    stages = tuple(replace(stage, mean_error=math.nan) for stage in report.stages)
    assert len(replace(report, stages=stages).failures) == 2


def test_a_failed_report_says_what_failed(student: torch.fx.GraphModule, model: Path) -> None:
    change(model, "classifier/bias", lambda codes: np.roll(codes, 1) + np.int32(5000) * (codes > 0))
    labels = predict(student, [images(256)]).argmax(axis=1)
    report = verify(model, student, images(256), labels=labels)
    assert report.stages[0].top1 == 100.0
    with pytest.raises(ParityError, match=r"optimisations off: agreement .* is below 99\.50 %"):
        report.raise_for_failures()
    assert any("points from the student's 100.00 %" in failure for failure in report.failures)
    assert report.to_dict()["passed"] is False


def test_the_file_appears_only_when_it_is_proven(
    student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    path = tmp_path / "proven.onnx"
    impossible = Tolerance(agreement=100.1)
    _, report = export_proven(student, path, images(64), tolerance=impossible)
    assert report.failures
    assert list(tmp_path.iterdir()) == []
    artifact, report = export_proven(student, path, images(64))
    assert not report.failures
    assert artifact.path == path
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_export_keeps_the_file_that_was_there(
    student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    export_proven(student, path, images(64), tolerance=Tolerance(agreement=100.1))
    assert path.read_bytes() == b"the one before"


def test_a_missing_folder_is_named(student: torch.fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the folder .*nowhere does not exist"):
        export(student, tmp_path / "nowhere" / "model.onnx")


def test_a_folder_is_refused_before_any_work(student: torch.fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is a folder; name a file in it"):
        export(student, tmp_path)
    with pytest.raises(ExportError, match="is a folder; name a file in it"):
        export_proven(nn.Identity(), tmp_path, [])  # no student, whose spec is what is read first
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_file_that_was_asked_for(
    student: torch.fx.GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sqakd_exporters.saving.replacing", full)
        with pytest.raises(ExportError, match=rf"cannot write {path}: No space left on device$"):
            export_proven(student, path, images(8))
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ExportError, match=rf"cannot write {path}: No space left on device$"):
        export_proven(student, path, images(8))
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_path_each_prove_their_own_file(
    student: torch.fx.GraphModule, tmp_path: Path
) -> None:
    """The second starts and ends between the first one's writing and its proof."""
    path = tmp_path / "model.onnx"
    other = quantize(network("mixed"), example=SHAPE)
    calibrate(other, images(64))

    def meanwhile() -> Iterator[torch.Tensor]:
        _, report = export_proven(other, path, images(16), tolerance=Tolerance(agreement=80))
        assert not report.failures
        yield images(16)

    _, report = export_proven(student, path, meanwhile())
    assert not report.failures
    assert list(tmp_path.iterdir()) == [path]
    assert not verify(path, student, images(16)).failures


def test_images_may_need_a_gradient(student: torch.fx.GraphModule, model: Path) -> None:
    assert not verify(model, student, images(16).requires_grad_()).failures
    (batch,) = reference_of(student, [images(16).requires_grad_()]).batches
    assert len(batch) == 16


def test_sizes_count_what_is_stored(student: torch.fx.GraphModule) -> None:
    graph = lower(student)
    inner = 8 * 16 * 9 + 16 * 16 * 9  # conv1, conv2 at 4 bits
    ends = 3 * 8 * 9 + 16 * 5  # stem, classifier at 8 bits
    norm, channels = 16, 8 + 16 + 16 + 16 + 5
    scales = channels - 4  # BatchNorm gives each channel its own; the classifier has one
    assert float_size(graph) == 4 * (inner + ends + norm + channels)
    assert expected_size(graph) == inner + ends + norm + 4 * (channels + scales)
    assert information_size(graph) == inner // 2 + ends + norm + 4 * (channels + scales)


def test_a_layer_that_is_called_twice_is_counted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.inner(F.relu(self.inner(x)))).mean((2, 3))

    made = quantize(Twice(), QuantSpec(first_last_bits=4), example=SHAPE)
    calibrate(made, images(16))
    graph = lower(made)
    assert sum(hasattr(node, "weight") for node in graph.nodes) == 2
    assert float_size(graph) == 4 * (3 * 3 * 9 + 3)
    assert information_size(graph) == 3 * 3 * 9 * 4 // 8 + 4 * (3 + 1)
    assert sizes_of(graph).narrow_layers == 2


def test_layers_of_the_same_codes_are_counted_each() -> None:
    """BatchNorms on their own have but one code, and scales and biases of their own."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.avg_pool2d(self.first(x), 2)
            return self.last(F.max_pool2d(self.second(x), 2)).mean((2, 3))

    model = Norms()
    for norm, factor in ((model.first, 1.0), (model.second, 2.0)):
        norm.weight.data = factor * torch.tensor([0.5, 0.7, 0.9])
    made = quantize(model.eval(), example=SHAPE)
    calibrate(made, images(16))
    graph = lower(made)
    first, second = (n for n in graph.nodes if n.name in ("first", "second"))
    np.testing.assert_array_equal(first.weight.codes, second.weight.codes)  # type: ignore[attr-defined]
    assert float_size(graph) == 4 * (2 * (3 + 3) + 3 * 2 + 2)


def test_the_output_step_is_that_of_the_output(student: torch.fx.GraphModule) -> None:
    graph = lower(student)
    grid = graph.values[graph.output].grid
    assert grid is not None
    logits = predict(student, [images(64)])
    assert output_step(graph, logits) == (float(grid.scale), "scale of the quantised output")


def test_measures_of_agreement() -> None:
    first = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]], np.float32)
    second = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]], np.float32)
    assert agreement(first, second) == 75.0
    assert accuracy(first, np.array([0, 1, 1, 1])) == 75.0
    assert divergence(first, first) == pytest.approx(0.0, abs=1e-7)
    p, q = np.exp([1.0, 2.0]), np.exp([2.0, 1.0])
    p, q = p / p.sum(), q / q.sum()
    assert divergence(first, second) == pytest.approx((p * np.log(p / q)).sum() / 4, rel=1e-5)


def test_an_answer_that_ties_in_the_student_is_the_students(tmp_path: Path) -> None:
    """Whatever the last bit of a sum makes the larger; a step below is another answer."""
    student = np.array([[3, 3, 1], [3, 3, 1], [3, 2, 1], [2, 2, 2]], np.float32) / 10
    given = student + np.array([[0, 1e-7, 0], [0, 0, 0.3], [0, 0.2, 0], [0, 0, 1e-7]], np.float32)
    assert given.argmax(axis=1).tolist() == [1, 2, 1, 2]
    assert answers(given, student, 0.1).tolist() == [0, 2, 1, 0]
    labels, file = np.array([0, 0, 0, 0]), tmp_path / "model.onnx"
    file.write_bytes(b"any")
    runs = Runs({"a runtime": given}, Coverage({}, {}, ()), {})
    report = report_of(file, runs, Expected("student", student, labels, (0.1, "given")))
    assert [(stage.agreement, stage.top1) for stage in report.stages] == [(100, 100), (50, 50)]
    assert report.ties == 3
    caption = " ".join(parity_lines(report))
    assert "largest logits tie in 3 images: any of those answers is its own" in caption


def one_moved(*numbers: int, count: int = 24) -> tuple[Runs, Expected]:
    """Answers to so many images, those of the numbers given otherwise in one stage of two."""
    student = np.tile(np.array([0.3, 0.2, 0.1], np.float32), (count, 1))
    given = student.copy()
    given[list(numbers), 1] = 0.4
    outputs = {"off": student, "on": given}
    labels = np.zeros(count, np.int64)
    return Runs(outputs, Coverage({}, {}, ()), {}), Expected("s", student, labels, (0.1, "given"))


RIGHT = IsolatedReport(8, (Isolated("quant", 100, 1, 1, 1e-6),), ())
WRONG = IsolatedReport(8, (Isolated("quant", 100, 1, 1, 0.3),), ())


def test_one_image_that_is_right_layer_by_layer_may_be_answered_otherwise(tmp_path: Path) -> None:
    """Below 200 images it is more than half a percent; what moved it is float32's rounding."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"any")
    runs, expected = one_moved(5)
    isolated = {"off": RIGHT, "on": RIGHT}
    report = report_of(file, runs, expected, isolated=isolated, layerwise=np.array([5, 1]))
    assert (report.explained, report.failures) == (("on",), [])
    assert "one image is answered otherwise" in " ".join(parity_lines(report))
    assert [(s["differing"], s["explained"]) for s in report.to_dict()["stages"]] == [
        (0, False),
        (0, False),
        (1, True),
    ]


def test_one_image_is_excused_where_it_alone_is_more_than_is_allowed(tmp_path: Path) -> None:
    """Who allows none gets none, and many images have room for one."""
    file = tmp_path / "model.onnx"
    file.write_bytes(b"any")
    isolated = {"off": RIGHT, "on": RIGHT}
    for count, tolerance, excused in (
        (24, Tolerance(agreement=100, accuracy=0), False),
        (24, Tolerance(agreement=95, accuracy=3), True),
        (250, Tolerance(agreement=99.7, accuracy=0.3), True),
        (250, Tolerance(agreement=99.7, accuracy=0), False),
    ):
        runs, expected = one_moved(5, count=count)
        given = np.array([5])
        report = report_of(file, runs, expected, tolerance, isolated=isolated, layerwise=given)
        assert report.explained == ("on",)
        assert (report.failures == []) is excused


@pytest.mark.parametrize(
    ("moved", "isolated", "layerwise"),
    [
        ([5], {"off": RIGHT, "on": RIGHT}, [1, 2]),  # that image was not run layer by layer
        ([5, 6], {"off": RIGHT, "on": RIGHT}, [5, 6]),
        ([5], {"off": RIGHT}, [5]),
        ([5], {"off": RIGHT, "on": replace(RIGHT, unseen=("other",))}, [5]),
        ([5], {"off": RIGHT, "on": WRONG}, [5]),
        ([5], {}, [5]),
    ],
)
def test_an_answer_that_nothing_explains_is_a_failure(
    moved: list[int], isolated: dict[str, IsolatedReport], layerwise: list[int], tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"any")
    runs, expected = one_moved(*moved)
    given = np.array(layerwise)
    report = report_of(file, runs, expected, isolated=isolated, layerwise=given)
    assert not report.explained
    assert any("agreement" in failure for failure in report.failures)
    assert any("top-1" in failure for failure in report.failures)


def two_stages(off: list[int], on: list[int]) -> tuple[Runs, Expected]:
    """A runtime without and with optimisations, each of which answers some images otherwise."""
    student = np.tile(np.array([0.3, 0.2, 0.1], np.float32), (24, 1))
    outputs = {"off": student.copy(), "on": student.copy()}
    for name, images_ in (("off", off), ("on", on)):
        outputs[name][images_, 1] = 0.4
        outputs[name][images_, 2] = -12.0  # 121 steps: 10 in the mean where six images are so
    sessions: dict[str, Any] = {"off": None, "on": None}
    expected = Expected("s", student, np.zeros(24, np.int64), (0.1, "given"))
    return Runs(outputs, Coverage({}, {}, ()), {}, sessions=sessions), expected


def test_rounding_without_optimisations_is_not_counted_if_with_them_all_is_the_same(
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"any")
    runs, expected = two_stages([1, 2, 3, 4, 5, 6], [])
    isolated, given = {"off": RIGHT, "on": replace(RIGHT, tensors=())}, np.array([1, 2])
    report = report_of(file, runs, expected, isolated=isolated, layerwise=given)
    assert report.failures == []
    assert report.exact == ("on",)
    assert report.to_dict()["exact"] == ["on"]
    assert [stage.only_rounding for stage in report.stages] == [False, True, False]
    caption = " ".join(parity_lines(report))
    assert "bit for bit the student's logits: on" in caption
    assert "how far the network carries their rounding is not counted" in caption
    strict = Tolerance(agreement=100, accuracy=0)
    report = report_of(file, runs, expected, strict, isolated=isolated, layerwise=given)
    assert len(report.failures) == 2


@pytest.mark.parametrize(
    ("off", "on", "isolated"),
    [
        ([1, 2, 3, 4, 5, 6], [1], {"off": RIGHT, "on": RIGHT}),  # the deployed one is not exact
        ([], [1, 2, 3, 4, 5, 6], {"off": RIGHT, "on": RIGHT}),  # nor excused by the other
        ([1, 2, 3, 4, 5, 6], [], {"off": WRONG, "on": RIGHT}),
        ([1, 2, 3, 4, 5, 6], [], {}),
    ],
)
def test_what_else_is_wrong_without_optimisations_counts(
    off: list[int], on: list[int], isolated: dict[str, IsolatedReport], tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"any")
    runs, expected = two_stages(off, on)
    report = report_of(file, runs, expected, isolated=isolated, layerwise=np.array([1, 2]))
    for words in ("agreement", "top-1", "in the mean"):
        assert any(words in failure for failure in report.failures)


def test_images_that_are_answered_otherwise_are_the_first_to_be_run_layer_by_layer() -> None:
    runs, expected = one_moved(7)
    runs.outputs["off"][3, 2] -= 5.0  # farther off, and the same answer
    assert runs.worst_images(expected, 2).tolist() == [7, 3]
    shown = replace(runs, undecided=frozenset({"on"}))
    assert shown.worst_images(expected, 2).tolist() == [3, 7]


def test_no_images_compare_nothing(student: torch.fx.GraphModule, model: Path) -> None:
    for none in (images(4)[:0], [images(4)[:0]], []):
        with pytest.raises(DataError, match="at least one image to compare on, got none"):
            verify(model, student, none)


@pytest.mark.parametrize(
    ("example", "got"),
    [
        (images(2)[0], r"Tensor of shape \(3, 8, 8\)"),
        (images(2).numpy(), r"ndarray of shape \(2, 3, 8, 8\)"),
        ((8, 8), r"tuple of shape \(8, 8\)"),
        (None, "NoneType"),
    ],
)
def test_an_example_of_another_form_is_refused(example: Any, got: str) -> None:
    with pytest.raises(SpecError, match=rf"images \(N, C, H, W\), or .* \(C, H, W\); got {got}$"):
        quantize(network("residual"), example=example)

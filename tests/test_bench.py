"""The benchmark: its arithmetic on made-up times, its processes on a small real file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from networks import SHAPE, exact_here, images, network
from onnx import TensorProto, helper
from PIL import Image, ImageDraw
from rich.console import Console
from small_network import SMALL

from sqakd_deploy.api import export
from sqakd_deploy.bench import process as bench_process
from sqakd_deploy.bench import worker as bench_worker
from sqakd_deploy.bench.baseline import export_float
from sqakd_deploy.bench.inputs import input_of
from sqakd_deploy.bench.measure import BenchOptions, BenchReport, bench
from sqakd_deploy.bench.plot import draw
from sqakd_deploy.bench.process import FP32, MODEL, Candidate, Process, Row, size_on_disk
from sqakd_deploy.bench.report import bench_lines, bench_tables, milliseconds
from sqakd_deploy.cli import main
from sqakd_deploy.config import RunConfig
from sqakd_deploy.cpu import Cpu, describe_cpu
from sqakd_deploy.data.preprocessing import Preprocessing
from sqakd_deploy.errors import ExportError, ModelError, SpecError
from sqakd_deploy.exporting import Coverage, ExportOptions, FloatFallback
from sqakd_deploy.plugins import RUNTIMES, get_runtime, runtimes
from sqakd_deploy.quantization import calibrate, quantize
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.training.train import train

QUICK = BenchOptions(rounds=2, seconds=0.01, warmup=0)


@pytest.fixture(autouse=True)
def _one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes half a second to start."""
    monkeypatch.setattr(bench_process, "STARTS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit student and its float model, as files."""
    where = tmp_path_factory.mktemp("files")
    teacher = network("residual")
    export_float(teacher, SHAPE, where / "fp32.onnx")
    student = quantize(teacher, QuantSpec(), example=SHAPE)
    calibrate(student, images(32))
    export(student, where / "model.onnx")
    return where


def row(kind: str, *turns: tuple[float, ...], threads: int = 1, **facts: Any) -> Row:
    layers = {"Conv": 4} if kind == MODEL else {}
    values: dict[str, Any] = {
        "runtime": "onnxruntime",
        "batch": 2,
        "load": 0.01,
        "peak": 50 * 2**20,
        "added": 10 * 2**20,
        "size": 4096,
        "coverage": Coverage(layers, {"Conv": 4}, ()),
    }
    return Row(kind=kind, turns=turns, threads=threads, **(values | facts))


def report(*rows: Row, **facts: Any) -> BenchReport:
    values: dict[str, Any] = {
        "path": Path("m.onnx"),
        "fp32": Path("f.onnx"),
        "shape": (2, 3, 8, 8),
        "skipped": {},
        "cpu": Cpu("Some CPU", 2, ("AVX512-VNNI",)),
        "load_average": 0.1,
        "bits": (4, 4),
    }
    return BenchReport(rows=rows, **(values | facts))


# -- arithmetic ----------------------------------------------------------------------------------


def test_figures_of_a_row() -> None:
    measured = row(MODEL, tuple(i / 1000 for i in range(1, 51)), tuple([0.1] * 50))
    assert measured.median == pytest.approx(0.075)
    assert measured.p95 == 0.1
    assert measured.throughput == pytest.approx(2 * 100 / (1.275 + 5.0))
    only = row(MODEL, tuple(i / 1000 for i in range(1, 101)))
    assert only.p95 == pytest.approx(0.095)
    for count, wanted in ((1, 1), (2, 2), (19, 19), (20, 19), (21, 20), (40, 38), (41, 39)):
        some = row(MODEL, tuple(float(i) for i in range(1, count + 1)))
        assert some.p95 == wanted


def test_speed_is_compared_turn_by_turn() -> None:
    """A machine that gets slower from round to round does not change the ratio."""
    ours = row(MODEL, (1.0, 1.0), (2.0, 2.0), (8.0, 8.0))
    floats = row(FP32, (3.0, 3.0), (6.0, 6.0), (24.0, 24.0))
    assert ours.faster_than(floats) == 3.0
    made = report(ours, floats, row(MODEL, (1.0,), threads=2))
    assert made.baseline(ours) is floats
    assert made.baseline(made.rows[2]) is None
    assert [r["speedup"] for r in made.to_dict()["rows"]] == [3.0, 1.0, None]
    assert json.loads(json.dumps(made.to_dict()))["path"] == "m.onnx"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": (1, 0)}, "threads: wanted at least 1, got 0"),
        ({"threads": ()}, "threads: wanted at least 1, got 0"),
        ({"batch": 0}, "batch: wanted at least 1, got 0"),
        ({"rounds": -1}, "rounds: wanted at least 1, got -1"),
        ({"seconds": 0.0}, "wanted seconds above 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        BenchOptions(**options)


# -- processes -----------------------------------------------------------------------------------


def test_every_runtime_is_measured_beside_fp32(folder: Path) -> None:
    turns: list[tuple[int, int]] = []
    made = bench(
        folder / "model.onnx",
        fp32=folder / "fp32.onnx",
        options=QUICK,
        progress=lambda done, total: turns.append((done, total)),
    )
    names = sorted(set(runtimes()) - {"qonnx"})  # it runs files of its own kind alone
    assert [(r.runtime, r.kind) for r in made.rows] == [
        (name, kind) for name in names for kind in (MODEL, FP32)
    ]
    assert made.bits == (4, 4)
    assert made.shape == (1, *SHAPE)
    assert turns == [(i + 1, 4 * len(names)) for i in range(4 * len(names))]
    for measured in made.rows:
        assert len(measured.turns) == 2
        assert all(len(turn) >= bench_worker.LEAST_RUNS for turn in measured.turns)
        assert 0 < measured.median <= measured.p95
        assert measured.load > 0
        whole = measured.coverage.integer == measured.coverage.total
        assert whole == (measured.kind == MODEL)
    assert made.rows[0].size == (folder / "model.onnx").stat().st_size
    if made.rows[0].peak is not None:
        assert all(0 < (r.added or 0) < (r.peak or 0) < 2**30 for r in made.rows)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_file_for_raw_pixels(layout: str, folder: Path, tmp_path: Path) -> None:
    student = quantize(network("residual"), QuantSpec(), example=SHAPE)
    calibrate(student, images(32))
    plain = Preprocessing(channels=3, input_size=SHAPE[1:], mean=(0.0,) * 3, std=(1.0,) * 3)
    options = ExportOptions(input_type="uint8", input_layout=layout)  # type: ignore[arg-type]
    facts = {"sqakd.preprocessing": plain.model_dump_json()}
    path = export(student, tmp_path / "raw.onnx", options=options, metadata=facts).path
    named = ("onnxruntime",)
    made = bench(path, fp32=folder / "fp32.onnx", runtime=named, options=QUICK)
    assert [r.kind for r in made.rows] == [MODEL, FP32]
    assert made.shape == (1, *SHAPE)


def test_a_float_model_that_a_runtime_refuses_is_no_baseline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("qonnx")
    student = quantize(network("residual"), QuantSpec(target="qonnx"), example=SHAPE)
    calibrate(student, images(32))
    path = export(student.eval(), tmp_path / "q.onnx").path
    made = bench(path, fp32=folder / "fp32.onnx", options=QUICK)
    assert [(r.runtime, r.kind) for r in made.rows] == [("qonnx", MODEL)]
    assert "qonnx, fp32" in made.skipped


def test_batch_and_threads(folder: Path) -> None:
    options = BenchOptions(threads=(1, 2), batch=3, rounds=1, seconds=0.01)
    made = bench(folder / "model.onnx", runtime=("onnxruntime",), options=options)
    assert [r.threads for r in made.rows] == [1, 2]
    assert made.shape == (3, *SHAPE)
    assert made.rows[0].throughput == pytest.approx(
        3 * len(made.rows[0].turns[0]) / sum(made.rows[0].turns[0])
    )


def test_files_are_loaded_in_fresh_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_process, "STARTS", 2)
    spawned = []
    spawn = bench_process._spawn

    def counting() -> subprocess.Popen[str]:
        spawned.append(spawn())
        return spawned[-1]

    monkeypatch.setattr(bench_process, "_spawn", counting)
    with Process(Candidate(MODEL, folder / "model.onnx", "onnxruntime", 1)):
        assert [process.poll() for process in spawned] == [0, None]
    assert [process.poll() for process in spawned] == [0, 0]


def test_a_worker_that_dies_is_told(folder: Path) -> None:
    class Dead(Process):
        def kill(self) -> None:
            self._process.kill()

    with Dead(Candidate(MODEL, folder / "model.onnx", "onnxruntime", 1)) as process:
        process.kill()
        with pytest.raises(ExportError, match=r"model\.onnx in onnxruntime: the process that meas"):
            process.take_turn((1, *SHAPE), 0, 0.01)


def test_the_worker_runs_at_least_three_times(folder: Path) -> None:
    worker = bench_worker.Worker()
    opened = worker.open(str(folder / "model.onnx"), "onnxruntime", 1)
    assert opened["load"] > 0
    assert len(worker.turn([1, *SHAPE], warmup=1, seconds=1e-9)["times"]) == 3
    assert worker.finish()["coverage"]["integer"]["Conv"] == 4


def test_memory_of_this_process() -> None:
    if not Path("/proc/self/status").exists():
        assert bench_worker.memory("VmRSS") is None
        return
    now, most = bench_worker.memory("VmRSS"), bench_worker.memory("VmHWM")
    assert now is not None
    assert most is not None
    assert 2**20 < now <= most
    assert bench_worker.memory("VmNothing") is None


# -- input ---------------------------------------------------------------------------------------


def made_model(path: Path, shape: list[int | str] | None, inputs: int = 1) -> Path:
    values = [
        helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, shape) for i in range(inputs)
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    sums = [helper.make_node("Sum", [value.name for value in values], ["out"])]
    graph = helper.make_graph(sums, "made", values, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    return path


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no file .*none\.onnx; sqakd-deploy export"):
        bench(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("this is no model at all")
    with pytest.raises(ExportError, match=r"text\.onnx is no ONNX file, or damaged"):
        bench(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match=r"empty\.onnx is empty, or no ONNX file"):
        bench(tmp_path / "empty.onnx")
    with pytest.raises(ExportError, match=r"is a folder; wanted an ONNX file, as sqakd-deploy exp"):
        bench(tmp_path)
    one = made_model(tmp_path / "one.onnx", ["N", 3, 8, 8])
    with pytest.raises(
        ExportError, match=r"^fp32: there is no file none\.onnx; name the float mod"
    ):
        bench(one, fp32="none.onnx")
    two = made_model(tmp_path / "two.onnx", ["N", 3, 8, 8], inputs=2)
    with pytest.raises(ModelError, match=r"with one input, got 'in0', 'in1'"):
        bench(two)


def test_shapes_that_cannot_be_run(tmp_path: Path) -> None:
    only = ("onnxruntime",)
    fixed = made_model(tmp_path / "fixed.onnx", [1, 3, 8, 8])
    with pytest.raises(ModelError, match=r"wanted a batch of 2, .* fixed at 1: .*--batch 1"):
        bench(fixed, runtime=only, options=BenchOptions(batch=2))
    free = made_model(tmp_path / "free.onnx", ["N", 3, "H", "W"])
    with pytest.raises(ModelError, match=r"leaves the size of its images open, .*--input-size 224"):
        bench(free, runtime=only)
    with pytest.raises(ModelError, match=r"wanted images of \[9, 9\] pixels, .*\[3, 8, 8\]"):
        bench(fixed, runtime=only, options=BenchOptions(input_size=(9, 9)))
    for shape in (None, ["N"]):
        flat = made_model(tmp_path / "flat.onnx", shape)
        with pytest.raises(ModelError, match=r"wanted an input \(N, C, H, W\), but 'in0'"):
            bench(flat, runtime=only)
    many = made_model(tmp_path / "many.onnx", ["N", 3, 8, 8])
    with pytest.raises(ModelError, match=r"fixed\.onnx: wanted a batch of 2, .* fixed at 1"):
        bench(many, fp32=fixed, runtime=only, options=BenchOptions(batch=2))
    other = made_model(tmp_path / "other.onnx", [1, 3, 9, 9])
    with pytest.raises(ModelError, match=r"other\.onnx: wanted images \[3, 8, 8\] as .*fixed"):
        bench(fixed, fp32=other, runtime=only)


def test_open_sizes_are_said_or_those_of_the_other_file(tmp_path: Path) -> None:
    free = made_model(tmp_path / "free.onnx", [-1, 3, "H", "W"])
    said = replace(QUICK, input_size=(6, 4))
    assert bench(free, runtime=("onnxruntime",), options=said).shape == (1, 3, 6, 4)
    fixed = made_model(tmp_path / "fixed.onnx", ["N", 3, 8, 8])
    measured = bench(fixed, fp32=free, runtime=("onnxruntime",), options=QUICK)
    assert (measured.shape, len(measured.rows)) == ((1, 3, 8, 8), 2)


def test_unknown_runtime(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"unknown runtime 'x'\. There are: .*onnxruntime"):
        bench(folder / "model.onnx", runtime=("x",))


def test_a_runtime_that_refuses_is_left_out_or_an_error(tmp_path: Path) -> None:
    """A file that no runtime opens: named, its own message; not named, all messages."""
    broken = made_model(tmp_path / "broken.onnx", ["N", 3, 8, 8])
    model = onnx.load(broken)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, broken)
    with pytest.raises(ExportError, match=r"^ONNX Runtime cannot load"):
        bench(broken, runtime=("onnxruntime",))
    with pytest.raises(ExportError, match=r"no runtime opens the file: .*ONNX Runtime cannot load"):
        bench(broken)


STRANGERS = """
import os
import numpy as np
from sqakd_deploy.exporting import Coverage

class Opened:
    input_shape = (None, 3, 8, 8)
    def run(self, images):
        return np.zeros((len(images), 5), np.float32)
    def coverage(self):
        return Coverage({}, {})

class Stranger:
    def open(self, path, *, optimize=True, threads=None):
        return self.session()

class Raises(Stranger):
    name = "raises"
    class session(Opened):
        def run(self, images):
            raise ZeroDivisionError("a bug of its own")

class Dies(Stranger):
    name = "dies"
    class session(Opened):
        def run(self, images):
            os._exit(3)

class Tells(Stranger):
    name = "tells"
    class session(Opened):
        def coverage(self):
            return {"Conv": 1}
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution of runtimes that open every file and fail later."""
    (tmp_path / "strangers.py").write_text(STRANGERS)
    info = tmp_path / "strangers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    names = "".join(f"{name.lower()} = strangers:{name}\n" for name in ("Raises", "Dies", "Tells"))
    (info / "entry_points.txt").write_text(f"[{RUNTIMES}]\n{names}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("strangers")
def test_a_runtime_that_fails_later_is_left_out_or_an_error(tmp_path: Path) -> None:
    path = made_model(tmp_path / "m.onnx", ["N", 3, 8, 8])
    made = bench(path, fp32=path, options=BenchOptions((1,), 1, 2, 0.01, 0))
    assert {row.runtime for row in made.rows} >= {"onnxruntime"}
    assert {row.runtime for row in made.rows}.isdisjoint({"raises", "dies", "tells"})
    assert "ZeroDivisionError: a bug of its own" in made.skipped["raises"]
    assert "ended with code 3" in made.skipped["dies"]
    assert "the runtime failed with TypeError" in made.skipped["tells"]
    with pytest.raises(ExportError, match="a bug of its own"):
        bench(path, runtime=("raises", "onnxruntime"), options=QUICK)


def test_ir_is_measured_where_it_can_be_opened(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    student = quantize(network("residual"), exact_here(QuantSpec(target="openvino")), example=SHAPE)
    calibrate(student, images(32))
    artifact = export(student, tmp_path / "m.xml")
    made = bench(artifact.path, options=QUICK)
    assert [r.runtime for r in made.rows] == ["openvino"]
    assert made.skipped == {}
    assert made.shape == (1, *SHAPE)
    assert made.bits == (4, 4)
    assert made.rows[0].size == artifact.size == size_on_disk(artifact.path)


def test_ir_for_raw_pixels_says_so_itself(tmp_path: Path) -> None:
    """Without OpenVINO: the process that measures is told what to run."""
    xml = (
        "<net><layers><layer type='Parameter'><data shape='?,8,6,3' element_type='u8'/></layer>"
        "</layers><rt_info><sqakd><input value='{&quot;layout&quot;:&quot;NHWC&quot;}'/></sqakd>"
        "</rt_info></net>"
    )
    (tmp_path / "m.xml").write_text(xml)
    found = input_of(tmp_path / "m.xml")
    assert found is not None
    assert (found.shape, found.pixels) == ((None, 3, 8, 6), True)
    (tmp_path / "m.xml").write_text("<net>")
    assert input_of(tmp_path / "m.xml") is None


# -- the float model -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "mixed", "preactivation"])
def test_the_float_model_is_the_teacher(name: str, tmp_path: Path) -> None:
    teacher = network(name)
    array = images(16)
    wanted = teacher(array).detach().numpy()
    path = export_float(teacher, SHAPE, tmp_path / "f.onnx").path
    got = get_runtime("onnxruntime").open(path).run(array.numpy())
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}


# -- words and pictures --------------------------------------------------------------------------


def test_honest_words() -> None:
    floats = Coverage({}, {"Conv": 4}, (FloatFallback("a", "Conv", "because"),))
    lines = "\n".join(bench_lines(report(row(MODEL, (1.0,), coverage=floats)), "a note"))
    assert "in integers in onnxruntime: 0 of 4 Conv" in lines
    assert "in float in onnxruntime: 1 layer, because" in lines
    assert "a note" in lines
    assert "the arithmetic stays int8" in lines
    assert "int8 instructions: AVX512-VNNI, no AMX" in lines
    assert "warning" not in lines
    full = "\n".join(bench_lines(report(row(MODEL, (1.0,)), bits=(8, 8), load_average=1.5)))
    assert "below 8 bits" not in full
    assert "the machine was busy (load average 1.5)" in full


@pytest.mark.parametrize(
    ("integer", "words"),
    [((), "without instructions for int8"), (None, "are not known"), (("AMX-INT8",), "AMX-INT8")],
)
def test_words_about_the_processor(integer: tuple[str, ...] | None, words: str) -> None:
    made = report(row(MODEL, (1.0,)), cpu=Cpu("Some CPU", 2, integer))
    line = next(line for line in bench_lines(made) if "on Some CPU, 2 cores" in line)
    assert words in line
    assert "no AMX" not in line or not integer


def test_processors_are_read(tmp_path: Path) -> None:
    intel, arm = tmp_path / "intel", tmp_path / "arm"
    intel.write_text("model name\t: Xeon\nflags\t\t: fpu avx512_vnni amx_int8\n\nmodel name: two\n")
    arm.write_text("Features\t: fp asimd asimddp i8mm\n")
    assert describe_cpu(intel).name == "Xeon"
    assert describe_cpu(intel).integer == ("AVX512-VNNI", "AMX-INT8")
    assert describe_cpu(arm).integer == ("dot product", "I8MM")
    assert describe_cpu(tmp_path / "none").integer is None
    assert describe_cpu().cores >= 1


def test_numbers_are_short() -> None:
    shown = [milliseconds(seconds) for seconds in (1.234e-4, 6.1234e-3, 0.45678)]
    assert shown == ["0.123 ms", "6.12 ms", "457 ms"]
    speed, costs = bench_tables(report(row(MODEL, (1e-3,)), row(FP32, (3e-3,)), load_average=None))
    assert speed.row_count == costs.row_count == 2
    assert list(speed.columns[1].cells) == ["w4a4", "fp32"]
    assert list(speed.columns[-1].cells) == ["3.00", "1.00"]
    assert list(costs.columns[-1].cells) == ["4 of 4", "0 of 4"]


def test_pictures(tmp_path: Path) -> None:
    made = report(row(MODEL, (1e-3,)), row(FP32, (4e-3,)), path=Path("<m>.onnx"))
    draw(made, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert text.count("<rect") == 3
    assert "&lt;m&gt;.onnx, batch 2: median latency" in text
    assert "onnxruntime, 1 thread, w4a4" in text
    assert "1.00 ms (4.00×)" in text
    widths = [float(part.split('"')[0]) for part in text.split('width="')[3:]]
    assert widths[1] == pytest.approx(4 * widths[0], rel=1e-2)
    draw(made, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        colors = {color for _, color in picture.getcolors(1 << 20) or []}  # type: ignore[misc]
    assert {(31, 119, 180), (154, 165, 177), (255, 255, 255)} <= colors
    with pytest.raises(SpecError, match=r"ends in \.svg or \.png, got 'p\.gif'"):
        draw(made, tmp_path / "p.gif")
    with pytest.raises(SpecError, match=r"the folder .*nowhere does not exist"):
        draw(made, tmp_path / "nowhere" / "p.svg")


def test_all_that_a_picture_says_has_glyphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's own font draws a box for a multiplication sign."""
    written: list[str] = []

    def text(pen: ImageDraw.ImageDraw, place: object, words: str, *args: Any, **more: Any) -> None:
        font = args[1]
        boxes = [c for c in words if [*font.getmask(c)] == [*font.getmask("\uffff")]]
        assert not boxes, words
        written.append(words)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    made = report(row(MODEL, (0.001,)), row(FP32, (0.0025,)))
    draw(made, tmp_path / "p.png", note="the file is for TensorRT")
    assert written[:2] == ["m.onnx, batch 2: median latency", "the file is for TensorRT"]
    assert "1.00 ms (2.50x)" in written
    draw(made, tmp_path / "p.svg", note="the file is for TensorRT")
    drawn = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert ">the file is for TensorRT<" in drawn
    assert "1.00 ms (2.50×)" in drawn


def test_tables_fit_eighty_columns() -> None:
    large = {"added": 142 * 2**20 // 10, "peak": 105 * 2**20, "load": 0.01234}
    rows = [row(kind, (0.01234,), size=1050 * 2**10, **large) for kind in (MODEL, FP32)]
    for label in (None, "w4a4-mixed"):
        paper = Console(file=StringIO(), width=80)
        for table in bench_tables(report(*rows), label):
            paper.print(table)
        shown = paper.file.getvalue()  # type: ignore[attr-defined]
        assert shown.count("onnxruntime") == 4
        assert shown.count(label or "w4a4") == 2
        assert max(map(len, shown.splitlines())) <= 80


def test_one_layer_in_float_is_one_layer() -> None:
    alone = Coverage({}, {"Conv": 1}, (FloatFallback("c", "Conv", "why"),))
    both = Coverage({}, {"Conv": 2}, alone.fallbacks * 2)
    assert "in float in onnxruntime: 1 layer, why" in bench_lines(
        report(row(MODEL, (0.1,), coverage=alone))
    )
    assert "in float in onnxruntime: 2 layers, the first: why" in bench_lines(
        report(row(MODEL, (0.1,), coverage=both))
    )


# -- the command ---------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ("--runtime", "onnxruntime", "--rounds", "1", "--seconds", "0.01")
    fp32 = ("--fp32", str(folder / "fp32.onnx"))
    done = run(str(folder / "model.onnx"), *quick, *fp32, "--plot", "p.svg")
    assert done.exit_code == 0, done.output
    assert "w4a4" in done.stdout
    assert "1 of 1 Gemm" in done.stdout
    assert (tmp_path / "p.svg").exists()
    done = run(str(folder / "model.onnx"), *quick, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert "model.onnx does not say whose student it is; name its run" in result["baseline"]
    assert [r["kind"] for r in result["rows"]] == ["model"]
    assert result["rows"][0]["coverage"]["integer"]["Conv"] == 4


def test_layers_with_bits_of_their_own_are_told(folder: Path, tmp_path: Path) -> None:
    """As training calls such a student."""
    proto = onnx.load(folder / "model.onnx")
    spec = QuantSpec(layer_bits={"*": "2"})
    (stated,) = [entry for entry in proto.metadata_props if entry.key == "sqakd.spec"]
    stated.value = spec.model_dump_json()
    onnx.save(proto, tmp_path / "m.onnx")
    quick = ("--runtime", "onnxruntime", "--rounds", "1", "--seconds", "0.01")
    assert spec.label == "w4a4-mixed"
    assert "w4a4-mixed" in run(str(tmp_path / "m.onnx"), *quick).stdout
    done = run(str(tmp_path / "m.onnx"), *quick, "--json")
    assert json.loads(done.stdout)["label"] == "w4a4-mixed"
    stated.value = '{"weights": {"bits": 4}, "activations": {"bits": 2}, "of": "later"}'
    onnx.save(proto, tmp_path / "m.onnx")
    assert input_of(tmp_path / "m.onnx").label == "w4a2"  # type: ignore[union-attr]


def test_files_named_like_modules_do_not_stand_in_for_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('this is no json')")
    monkeypatch.chdir(tmp_path)
    with Process(Candidate(MODEL, folder / "model.onnx", "onnxruntime", 1)) as worker:
        worker.take_turn((1, *SHAPE), warmup=0, seconds=0.01)
        assert worker.row(1).median > 0


def test_without_torch(folder: Path, tmp_path: Path) -> None:
    """On a device: files are measured, and what needs torch says so."""
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from sqakd_deploy.cli import main; main(sys.argv[1:])"
    )

    def called(*arguments: str) -> subprocess.CompletedProcess[str]:
        given = [sys.executable, "-c", code, *arguments]
        return subprocess.run(given, capture_output=True, text=True, check=False, cwd=tmp_path)

    quick = ("--runtime", "onnxruntime", "--rounds", "1", "--seconds", "0.01", "--json")
    for more in ((), ("--fp32", str(folder / "fp32.onnx"))):
        done = called("bench", str(folder / "model.onnx"), *quick, *more)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert len(result["rows"]) == 1 + bool(more)
        assert more or result["baseline"].startswith("no fp32 beside it: there is no torch here;")
    assert "onnxruntime" in called("list", "targets").stdout
    done = called("list")
    assert done.returncode == 0
    missing = [
        f"{kind}: not listed, since torch is not installed" for kind in ("methods", "models")
    ]
    assert done.stderr.splitlines() == missing
    assert "cifar10" in done.stdout
    assert "onnxruntime" in done.stdout
    done = called("list", "methods")
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error: this needs torch, which is not installed")


def test_weights_beside_the_float_model(folder: Path, tmp_path: Path) -> None:
    """As ``torch.onnx.export`` writes them: what the runtime makes of it still names them."""
    path = tmp_path / "fp32.onnx"
    onnx.save(
        onnx.load(folder / "fp32.onnx"),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=128,
    )
    report = bench(folder / "model.onnx", fp32=path, runtime=["onnxruntime"], options=QUICK)
    parts = path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    alone = bench(folder / "fp32.onnx", runtime=["onnxruntime"], options=QUICK).rows[0]
    _, found = report.rows
    assert (found.size, found.coverage) == (parts, alone.coverage)


def test_the_teacher_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"distillation": {"epochs": 0}, "teacher": {"epochs": 1}, "model": {"name": SMALL}}
    folder = train(RunConfig.model_validate(settings)).run
    assert CliRunner().invoke(main, ["export", "m.onnx", "--min-agreement", "0"]).exit_code == 0
    quick = ("--runtime", "onnxruntime", "--rounds", "1", "--seconds", "0.01", "--json")
    for chosen in ((), ("--run", str(folder))):
        done = run("m.onnx", *quick, *chosen)
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert result["baseline"] == f"fp32: the teacher of {folder}"
        assert result["fp32"] is None  # a file that is gone
        assert [r["kind"] for r in result["rows"]] == ["model", "fp32"]
        assert result["rows"][1]["coverage"]["total"]["Gemm"] == 1
    newer = train(
        RunConfig.model_validate(settings | {"distillation": {"epochs": 0, "seed": 1}})
    ).run
    assert json.loads(run("m.onnx", *quick).stdout)["baseline"] == f"fp32: the teacher of {folder}"
    shutil.rmtree(folder)
    result = json.loads(run("m.onnx", *quick).stdout)
    assert result["baseline"].startswith("no fp32 beside it: m.onnx is the student of no run under")
    assert f"teacher of {newer}" in run("m.onnx", *quick, "--run", str(newer)).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("none.onnx",), 7, "error: there is no file none.onnx"),
        (("m.onnx", "--threads", "0"), 2, "wanted N or N,M with N of at least 1, got '0'"),
        (("m.onnx", "--threads", "1,x"), 2, "got '1,x'"),
        (("m.onnx", "--runtime", "x"), 2, "error: unknown runtime 'x'"),
        (("m.onnx", "--batch", "0"), 2, "0 is not in the range x>=1"),
        (("m.onnx", "--plot", "p.gif"), 2, "error: plot: wanted a name that ends in .svg or .png"),
        (("m.onnx", "--run", "nope"), 5, "error: nope is no run folder"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes((folder / "model.onnx").read_bytes())
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stdout == ""

"""Hand-made graphs through three arithmetics: integers in numpy, ONNX Runtime off and on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_graphs import CASES, UINT8, Builder, Case, images, vector
from onnx import TensorProto, helper, numpy_helper
from reference_executor import logits
from sqakd_exporters import onnxruntime, requantising
from sqakd_exporters.floats import FLOAT_EMITTERS
from sqakd_exporters.onnxruntime import OnnxRuntime, OnnxRuntimeExporter
from sqakd_exporters.pooling import with_padding_apart
from sqakd_exporters.qdq import EMITTERS, OPSETS
from sqakd_exporters.requantising import with_levels_at_the_top
from sqakd_exporters.unsigned import as_unsigned

from sqakd_deploy import graph as g
from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import Exporter, ExportOptions, Runtime, Session
from sqakd_deploy.spec import QuantSpec

# Rule 20 allows one step. These graphs are small and their scales keep sums off rounding
# boundaries, so the three arithmetics give the same codes; what is left is one float32 product.
SAME_CODE = 1e-4


def write(graph: g.IntegerGraph, folder: Path, **options: object) -> Path:
    path = folder / f"{graph.name}.onnx"
    return OnnxRuntimeExporter().export(graph, path, ExportOptions(**options)).path  # type: ignore[arg-type]


def step_of(graph: g.IntegerGraph, reference: np.ndarray) -> float:
    grid = graph.values[graph.output].grid
    return float(grid.scale) if grid else float(np.ptp(reference)) / 255


def error_in_steps(graph: g.IntegerGraph, path: Path, optimize: bool, count: int = 48) -> float:
    array = images(count, graph.values[graph.input].shape[1:], seed=5)  # type: ignore[arg-type]
    reference = logits(graph, array)
    got = OnnxRuntime().open(path, optimize=optimize).run(array)
    assert got.dtype == np.float32
    assert got.shape == reference.shape
    return float(np.abs(got - reference).max()) / step_of(graph, reference)


@pytest.mark.parametrize("name", list(CASES))
def test_three_arithmetics_agree(name: str, tmp_path: Path) -> None:
    graph = CASES[name]().graph
    path = write(graph, tmp_path)
    # `floats` sums hundreds of float32 products before it is compared with float64
    allowed = 0.01 if name == "floats" else SAME_CODE
    assert error_in_steps(graph, path, optimize=False) <= allowed
    assert error_in_steps(graph, path, optimize=True) <= allowed


@pytest.mark.parametrize("name", list(CASES))
def test_what_fuses(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]()
    coverage = OnnxRuntime().open(write(case.graph, tmp_path)).coverage()
    assert dict(coverage.integer) == dict(case.integer)
    assert {fallback.node for fallback in coverage.fallbacks} == case.floats
    assert all("rule" in fallback.reason for fallback in coverage.fallbacks)
    assert sum(coverage.total.values()) == sum(case.integer.values()) + len(case.floats)


def test_the_cases_use_every_node_and_kind_of_grid() -> None:
    graphs = [make().graph for make in CASES.values()]
    kinds = {type(node) for graph in graphs for node in graph.nodes}
    elsewhere = {*FLOAT_EMITTERS, g.Mul}  # test_families.py
    assert kinds == set(EMITTERS) - elsewhere
    grids = [value.grid for graph in graphs for value in graph.values.values() if value.grid]
    assert {grid.bits for grid in grids} >= {1, 2, 3, 4, 5, 8}
    assert {grid.dtype for grid in grids} == {"uint8", "int8"}


@pytest.mark.parametrize("equal", [True, False])
def test_resizing_between_equal_grids_is_kept_from_codes(equal: bool, tmp_path: Path) -> None:
    """Older ONNX Runtimes resize the codes there, and cut off (onnxruntime #21319)."""
    b = Builder((3, 8, 8))
    x = b.layer("conv1", b.quantize("image", "x", UINT8, 128), 8)
    grid = b.values[x].grid
    assert grid is not None
    scale = (np.float32(1.27), np.float32(1.63))
    x = b.append(g.Resize, "larger", x, scale=scale, align_corners=False)
    step = grid.scale if equal else np.float32(grid.scale * 0.9)
    x = b.append(g.Quantize, "again", x, grid=replace(grid, scale=step), step=step)
    graph = b.graph(b.pool_and_classify(x))
    path = write(graph, tmp_path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert ("Max" in kinds) == equal
    for optimize in (False, True):  # places between pixels are float32's, to 1e-4 of a step
        assert error_in_steps(graph, path, optimize) <= 1 + SAME_CODE


def test_a_float_bias_is_rounded_by_the_runtime(tmp_path: Path) -> None:
    """ONNX Runtime makes an int32 of a float bias: half an accumulator step, here one code."""
    graph = vector()
    path = write(graph, tmp_path)
    assert error_in_steps(graph, path, optimize=False) <= SAME_CODE
    assert error_in_steps(graph, path, optimize=True) <= 1 + SAME_CODE


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_runs_and_fuses(opset: int, tmp_path: Path) -> None:
    case = CASES["residual"]()
    path = write(case.graph, tmp_path, opset=opset)
    model = onnx.load(path)
    assert [(i.domain, i.version) for i in model.opset_import] == [("", opset)]
    least = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])
    assert model.ir_version == least
    assert error_in_steps(case.graph, path, optimize=True) <= SAME_CODE
    assert dict(OnnxRuntime().open(path).coverage().integer) == dict(case.integer)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_batch_is_dynamic(batch: int, tmp_path: Path) -> None:
    session = OnnxRuntime().open(write(CASES["shuffle"]().graph, tmp_path), threads=1)
    array = images(8)
    np.testing.assert_array_equal(session.run(array[:batch]), session.run(array)[:batch])


def test_they_are_what_the_protocols_say(tmp_path: Path) -> None:
    assert isinstance(OnnxRuntimeExporter(), Exporter)
    assert isinstance(OnnxRuntime(), Runtime)
    assert isinstance(OnnxRuntime().open(write(vector(), tmp_path)), Session)
    OnnxRuntimeExporter().check(QuantSpec())
    artifact = OnnxRuntimeExporter().export(vector(), tmp_path / "again.onnx", ExportOptions())
    assert (artifact.exporter, artifact.size) == ("onnxruntime", artifact.path.stat().st_size)


# -- forms that ONNX Runtime computes wrongly, and how they are avoided ------------------------


def requantised(first: tuple[int, int], second: tuple[int, int]) -> g.IntegerGraph:
    builder = Builder(shape=(40,))
    codes = builder.quantize("first", "x", first, 100)
    return builder.graph(builder.quantize("second", codes, second, 128))


def test_a_requantisation_keeps_its_two_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left alone, ONNX Runtime makes one grid of two: a fifth of the codes moves."""
    monkeypatch.setattr(requantising, "rounds_alike", lambda *grids: False)
    graph = requantised(UINT8, UINT8)
    path = write(graph, tmp_path)
    assert error_in_steps(graph, path, optimize=True) <= SAME_CODE
    model = onnx.load(path)
    (clip,) = [node for node in model.graph.node if node.op_type == "Clip"]
    (source,) = [node for node in model.graph.node if clip.input[0] in node.output]
    source.output[0] = clip.output[0]
    model.graph.node.remove(clip)
    onnx.save(model, path)
    assert error_in_steps(graph, path, optimize=False) <= SAME_CODE
    assert error_in_steps(graph, path, optimize=True) >= 0.5


@pytest.mark.parametrize("second", [UINT8, (0, 15)])
def test_a_requantisation_is_one_integer_kernel(second: tuple[int, int], tmp_path: Path) -> None:
    """A pass over bytes instead of two through float32; not counted as a layer."""
    graph = requantised(UINT8, second)
    path = write(graph, tmp_path)
    for optimize in (False, True):
        assert error_in_steps(graph, path, optimize=optimize) <= SAME_CODE
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    made = Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)
    assert (made["QLinearAdd"], made["QuantizeLinear"], made["DequantizeLinear"]) == (1, 1, 1)
    for optimize in (False, True):
        coverage = OnnxRuntime().open(path, optimize=optimize).coverage()
        assert (coverage.total, coverage.fallbacks) == ({}, ())


@given(
    st.floats(2.0**-7, 1.0, width=32).map(np.float32),
    st.sampled_from([0, 100, 128]),
    st.sampled_from([0, 8, 128, 240, 252]),
    st.integers(3, 120),
    st.integers(1, 60),
    st.floats(-6.5, -3.5),
    st.sampled_from([-1, 1]),
)
@settings(max_examples=300, deadline=None)
def test_the_integer_kernel_rounds_as_the_pair_where_it_takes_its_place(
    scale: np.float32, zero: int, other: int, level: int, below: int, exponent: float, side: int
) -> None:
    """ONNX Runtime's own answers to all codes, one of which lies next to a border. The kernel adds
    zero-points before it rounds: with them, a border is wider."""
    step = np.float32(level * float(scale) / (below + 0.5 + side * 10**exponent))
    source, target = g.Grid(scale, zero, 0, 255), g.Grid(step, other, 0, 255)
    if not requantising.rounds_alike(source, step, target):
        return
    codes = np.arange(256, dtype=np.uint8)
    kernel, pair = (
        rounded_anew(source, target, with_sum).run(None, {"x": codes})[0]
        for with_sum in (True, False)
    )
    np.testing.assert_array_equal(kernel, pair)


def rounded_anew(source: g.Grid, target: g.Grid, with_sum: bool) -> ort.InferenceSession:
    constants = {
        "source": source.scale,
        "source_zero": np.uint8(source.zero_point),
        "target": target.scale,
        "target_zero": np.uint8(target.zero_point),
        "whole": np.float32(1.0),
        "none": np.uint8(0),
    }
    nodes = [helper.make_node("DequantizeLinear", ["x", "source", "source_zero"], ["real"])]
    if with_sum:
        nodes += [
            helper.make_node("DequantizeLinear", ["none", "whole", "none"], ["nothing"]),
            helper.make_node("Add", ["real", "nothing"], ["sum"]),
        ]
    nodes.append(
        helper.make_node("QuantizeLinear", [nodes[-1].output[0], "target", "target_zero"], ["y"])
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.UINT8, [256]) for name in "xy"]
    held = [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "anew", ends[:1], ends[1:], held)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_code_on_a_border_keeps_the_pair(tmp_path: Path) -> None:
    """Half a step: every odd code lies on one, and the pair's float32 decides where it falls."""
    grid = g.Grid(np.float32(0.1), 0, 0, 255)
    for step, alike in ((np.float32(0.173), True), (np.float32(0.2), False)):
        assert requantising.rounds_alike(grid, step, replace(grid, scale=step)) is alike
    assert not requantising.rounds_alike(grid, np.float32(1e-9), replace(grid, scale=np.float32(1)))
    graph = requantised(UINT8, UINT8)
    first, second = graph.nodes
    doubled = np.float32(2 * first.step)  # type: ignore[union-attr]
    value = graph.values[second.output]
    assert value.grid is not None
    values = {**graph.values, value.name: replace(value, grid=replace(value.grid, scale=doubled))}
    tied = replace(graph, nodes=(first, replace(second, step=doubled)), values=values)  # type: ignore[call-arg]
    path = write(tied, tmp_path)
    assert "Add" not in {node.op_type for node in onnx.load(path).graph.node}


def clips_in(path: Path) -> int:
    return sum(node.op_type == "Clip" for node in onnx.load(path).graph.node)


def test_only_full_grids_right_behind_full_grids_need_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {"right behind": (UINT8, UINT8), "narrow": ((0, 200), UINT8)}
    assert [clips_in(write(requantised(*b), tmp_path)) for b in bounds.values()] == [0, 1]
    monkeypatch.setattr(requantising, "rounds_alike", lambda *grids: False)
    assert [clips_in(write(requantised(*b), tmp_path)) for b in bounds.values()] == [1, 1]


def narrowed(read: Callable[[Builder, str], str], zero: int = 0) -> g.IntegerGraph:
    """Codes of 8 bits rounded to 16 levels, and what reads those."""
    builder = Builder()
    codes = builder.layer("stem", builder.quantize("image", "x", UINT8, 128), 8)
    if zero:
        codes = builder.quantize("signed", builder.conv("other", codes, 8), UINT8, zero)
    levels = builder.quantize("narrow", codes, (0, 15), zero // 16)
    return builder.graph(builder.quantize("out", read(builder, levels), UINT8, 128))


@pytest.mark.parametrize("groups", [1, 8])
def test_what_is_rounded_anew_is_cut_by_saturation(groups: int, tmp_path: Path) -> None:
    """Levels at the top of the type need no Clip; also behind padding, and in depthwise layers."""
    graph = narrowed(lambda b, x: b.conv("conv", x, 8, groups=groups))
    path = write(graph, tmp_path)
    assert clips_in(path) == 0
    for optimize in (False, True):
        assert error_in_steps(graph, path, optimize=optimize) <= SAME_CODE
    found = with_levels_at_the_top(as_unsigned(graph)).values["narrow_out"].grid
    assert found is not None
    assert (found.zero_point, found.qmin, found.qmax) == (240, 0, 255)


@pytest.mark.parametrize(
    "graph",
    [
        narrowed(lambda b, x: b.conv("conv", x, 8), zero=128),  # some are negative
        narrowed(lambda b, x: b.conv("conv", x, 8, bits=8)),  # kernels could saturate
        narrowed(lambda b, x: b.append(g.Add, "add", x, b.conv("conv", x, 8))),  # a sum reads it
        narrowed(lambda b, x: b.append(g.Concat, "cat", x, x, axis=1)),  # codes are copied
        narrowed(lambda b, x: x),
    ],
)
def test_levels_stay_where_saturation_would_not_do(graph: g.IntegerGraph, tmp_path: Path) -> None:
    unsigned = as_unsigned(graph)
    assert with_levels_at_the_top(unsigned).values == unsigned.values
    for optimize in (False, True):
        assert error_in_steps(graph, write(graph, tmp_path), optimize=optimize) <= SAME_CODE


def average(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int]
) -> g.IntegerGraph:
    builder = Builder()
    codes = builder.quantize("image", "x", UINT8, 90)
    mean = builder.append(
        g.AveragePool,
        "mean",
        codes,
        kernel=kernel,
        stride=stride,
        padding=padding,
        ceil_mode=True,
        count_include_pad=True,
    )
    return builder.graph(builder.quantize("out", mean, UINT8, 60))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((3, 3), (2, 2), (0, 0, 0, 0)),  # hangs over
        ((3, 3), (2, 2), (1, 1, 1, 1)),  # hangs over, padded
        ((3, 3), (2, 2), (1, 0, 1, 0)),  # hangs over, padded unevenly
        ((3, 3), (2, 2), (0, 1, 1, 1)),  # fits
        ((2, 2), (2, 2), (0, 0, 0, 0)),  # fits
        ((2, 2), (3, 3), (1, 1, 1, 1)),  # hangs over, strides beyond the kernel
    ],
)
def test_average_pools_that_round_up_and_count_padding(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    tmp_path: Path,
) -> None:
    graph = average(kernel, stride, padding)
    path = write(graph, tmp_path)
    assert error_in_steps(graph, path, optimize=False) <= SAME_CODE
    assert error_in_steps(graph, path, optimize=True) <= SAME_CODE
    assert OnnxRuntime().open(path).coverage().fallbacks == ()


def test_a_pool_without_an_exact_form_is_refused(tmp_path: Path) -> None:
    graph = average((2, 3), (3, 2), (1, 1, 1, 1))
    with pytest.raises(ExportError, match=r"node 'mean': AveragePool with ceil_mode, .* no exact"):
        write(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_passes_leave_other_graphs_alone() -> None:
    graph = CASES["residual"]().graph
    assert with_padding_apart(graph) == graph
    assert as_unsigned(graph) == graph


def test_signed_grids_become_unsigned() -> None:
    graph = CASES["signed"]().graph
    shifted = as_unsigned(graph)
    for name, value in graph.values.items():
        other = shifted.values[name].grid
        if value.grid is None:
            assert other is None
            continue
        assert other is not None
        assert (other.dtype, other.scale) == ("uint8", value.grid.scale)
        assert other.zero_point - other.qmin == value.grid.zero_point - value.grid.qmin
        assert other.bits == value.grid.bits
    array = images(8)
    np.testing.assert_array_equal(logits(shifted, array), logits(graph, array))


# -- files ------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(vector(), tmp_path)
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"cannot write .*made\.onnx: No space left on device"):
        write(vector(), tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write .*file/made\.onnx: Not a directory"):
        write(vector(), tmp_path / "file")


def test_an_invalid_model_is_not_written(tmp_path: Path) -> None:
    graph = CASES["floats"]().graph
    nodes = tuple(
        replace(node, bias=node.bias.astype(np.float64))
        if isinstance(node, g.Linear) and isinstance(node.bias, np.ndarray)
        else node
        for node in graph.nodes
    )
    with pytest.raises(ExportError, match="not valid ONNX"):
        write(replace(graph, nodes=nodes), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_what_the_runtime_refuses_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*broken\.onnx"):
        OnnxRuntime().open(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*nowhere\.onnx"):
        OnnxRuntime().open(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 8, 9), (3, 8, 8)])
def test_a_wrong_shape_is_explained(shape: tuple[int, ...], tmp_path: Path) -> None:
    session = OnnxRuntime().open(write(CASES["plain"]().graph, tmp_path))
    with pytest.raises(ExportError, match=r"wanted images \['N', 3, 8, 8\], got \["):
        session.run(np.zeros(shape, np.float32))


def small(path: Path, nodes: list[onnx.NodeProto], inputs: list[str], shape: list[object]) -> Path:
    def value(name: str, dims: list[object] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    graph = helper.make_graph(
        nodes, "g", [value(name, shape) for name in inputs], [value("y", None)]
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path
    )
    return path


def test_a_file_with_two_inputs_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    path = small(tmp_path / "two.onnx", nodes, ["a", "b"], ["N", 3])
    with pytest.raises(ExportError, match=r"two\.onnx: wanted one input and one output, got 2"):
        OnnxRuntime().open(path)


def test_a_run_that_fails_names_the_file(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    path = small(tmp_path / "square.onnx", nodes, ["x"], ["N", "M"])
    session = OnnxRuntime().open(path)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot run .*square\.onnx"):
        session.run(np.zeros((2, 3), np.float32))


def test_the_runtime_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()  # what plugins of pytest said
    session = OnnxRuntime().open(write(CASES["floats"]().graph, tmp_path))
    session.run(images(2))
    session.coverage()
    assert capfd.readouterr() == ("", "")


def test_without_optimisations_everything_is_float(tmp_path: Path) -> None:
    path = write(CASES["plain"]().graph, tmp_path)
    coverage = OnnxRuntime().open(path, optimize=False).coverage()
    assert dict(coverage.integer) == {}
    assert {fallback.node for fallback in coverage.fallbacks} == {
        "stem",
        "conv1",
        "conv2",
        "pool",
        "fc",
    }
    assert all("runs without optimisations" in f.reason for f in coverage.fallbacks)


@pytest.mark.parametrize(
    ("optimize", "threads", "wanted"),
    [(True, 2, ("ORT_ENABLE_ALL", 2)), (False, None, ("ORT_DISABLE_ALL", 0))],
)
def test_settings_reach_the_runtime(
    optimize: bool,
    threads: int | None,
    wanted: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0 threads leave the number to ONNX Runtime; only the CPU provider is asked for."""
    seen = []

    class Spy(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, options: ort.SessionOptions, **more: object) -> None:
            level = options.graph_optimization_level.name
            seen.append((level, options.intra_op_num_threads, more["providers"]))
            super().__init__(path, options, **more)

    path = write(vector(), tmp_path)
    monkeypatch.setattr(ort, "InferenceSession", Spy)
    OnnxRuntime().open(path, optimize=optimize, threads=threads)
    assert seen == [(*wanted, ["CPUExecutionProvider"])]


def test_threads_change_no_number(tmp_path: Path) -> None:
    path = write(CASES["residual"]().graph, tmp_path)
    one, two = (OnnxRuntime().open(path, threads=count).run(images(16)) for count in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write(CASES["plain"]().graph, tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot load .*plain\.onnx"):
        OnnxRuntime().open(path)


def test_two_writes_are_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of Python's sets: each write has a process of its own."""
    code = (
        "import sys; from pathlib import Path; from integer_graphs import CASES;"
        "from test_exporters_onnxruntime import write;"
        "[write(CASES[name]().graph, Path(sys.argv[1])) for name in sorted(CASES)]"
    )
    written = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": str(Path(__file__).parent),
        }
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(written[0]) == len(CASES)
    assert written[0] == written[1]


def test_threads_of_a_proof_do_not_spin() -> None:
    options = onnxruntime._options(True, threads=None)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("cpu", "asked"), [("vnni", "0"), ("no vnni", "1"), ("unknown", "1"), ("not x86", "1")]
)
def test_exact_kernels_are_asked_for_where_the_others_may_saturate(
    cpu: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512-VNNI the others are exact, and 3.5 times faster."""
    monkeypatch.setattr(onnxruntime, "this_cpu", lambda: cpu)
    opened: list[ort.SessionOptions] = []
    real = onnxruntime._session

    def watched(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        opened.append(options)
        return real(path, options)

    monkeypatch.setattr(onnxruntime, "_session", watched)
    graph = CASES["plain"]().graph
    OnnxRuntime().open(write(graph, tmp_path), optimize=True)
    (options,) = opened
    assert options.get_session_config_entry("session.x64quantprecision") == asked

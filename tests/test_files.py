from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sqakd_deploy.errors import ExportError
from sqakd_deploy.files import replacing, size_on_disk, write_text
from sqakd_deploy.onnx_file import read_onnx


def write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk full")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk full"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_write_replaces(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def model() -> onnx.ModelProto:
    """A product by a thousand weights, and a constant node of as many."""
    held = numpy_helper.from_array(np.ones(1000, np.float32), "c")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=held),
        helper.make_node("Mul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "c"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1000]) for name in "xy"]
    weights = numpy_helper.from_array(np.ones(1000, np.float32), "w")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("apart", [True, False], ids=["a file each", "one file"])
def test_weights_in_other_files_count(apart: bool, tmp_path: Path) -> None:
    """Whatever these are called, and whatever else lies there."""
    path = tmp_path / "m.onnx"
    onnx.save(
        model(),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=not apart,
        location=None if apart else "other.bin",
        convert_attribute=True,
    )
    (tmp_path / "m.onnx.data").write_bytes(bytes(10**6))
    beside = [file for file in tmp_path.iterdir() if file.name not in ("m.onnx", "m.onnx.data")]
    assert len(beside) == 1 + apart
    assert sum(file.stat().st_size for file in beside) == 8000
    assert size_on_disk(path) == path.stat().st_size + 8000


def test_what_names_no_other_file_is_all_there_is(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    (tmp_path / "m.onnx.data").write_bytes(bytes(10**6))  # left by another of that name
    assert size_on_disk(path) == path.stat().st_size
    text = tmp_path / "m.plugin"
    text.write_text("a plugin's own format")
    assert size_on_disk(text) == 21


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="w.bin")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ExportError, match=r"m\.onnx: its weights cannot be read from \S+w\.bin"):
        read_onnx(path)
    assert size_on_disk(path) == path.stat().st_size

"""Concatenations of codes: the same function, and what is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from integer_graphs import CASES, images
from reference_executor import execute, logits
from sqakd_exporters.joining import with_codes_joined
from sqakd_exporters.onnxruntime import OnnxRuntimeExporter

from sqakd_deploy.errors import ExportError
from sqakd_deploy.exporting import ExportOptions


def test_roundings_and_activations_move_before_it() -> None:
    graph = CASES["joined"]().graph
    nodes = {node.name: node for node in with_codes_joined(graph).nodes}
    assert nodes["concat2"].inputs == ("wide_out/0", "wide_out/1")
    assert nodes["concat2"].output == "wide_out"
    assert nodes["wide/0"].inputs == ("left_out",)
    assert nodes["concat1"].inputs == ("narrow_out/0", "narrow_out/1")
    assert nodes["narrow/1"].inputs == ("both_relu_out/1",)
    assert nodes["both_relu/1"].inputs == ("three_out",)
    assert not {"wide", "narrow", "both_relu"} & set(nodes)


def test_it_is_the_same_function() -> None:
    graph = CASES["joined"]().graph
    array = images(16, graph.values[graph.input].shape[1:], seed=3)  # type: ignore[arg-type]
    other = with_codes_joined(graph)
    np.testing.assert_array_equal(logits(other, array), logits(graph, array))
    codes = [execute(each, array)["wide_out"] for each in (graph, other)]
    np.testing.assert_array_equal(*codes)


@pytest.mark.parametrize("name", ["branches", "residual"])
def test_parts_on_grids_of_their_own_stay(name: str) -> None:
    graph = CASES[name]().graph
    assert with_codes_joined(graph) == graph


def test_codes_on_other_grids_cannot_be_joined(tmp_path: Path) -> None:
    graph = with_codes_joined(CASES["joined"]().graph)
    part = graph.values["wide_out/0"]
    assert part.grid is not None
    moved = replace(part, grid=replace(part.grid, zero_point=21))
    wrong = replace(graph, values={**graph.values, part.name: moved})
    with pytest.raises(ExportError, match="'concat2': wanted all inputs on the grid"):
        OnnxRuntimeExporter().export(wrong, tmp_path / "m.onnx", ExportOptions())
    assert not list(tmp_path.iterdir())

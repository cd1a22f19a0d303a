"""A student's own answers, layer by layer, as PyTorch computes them in integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sqakd_deploy import graph as ir
from sqakd_deploy.evaluate import predict
from sqakd_deploy.lowering.exact import in_integers
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.tracing.shapes import Recorder
from sqakd_deploy.tracing.trace import first_tensor
from sqakd_deploy.verification.constants import constants_of, offset
from sqakd_deploy.verification.operators import operators_of
from sqakd_deploy.verification.reference import Reference, Tensor
from sqakd_deploy.verification.sizes import sizes_of
from sqakd_deploy.verification.stages import output_step

_CHUNK = 8  # images whose tensors are all held at a time


def reference_of(
    student: nn.Module,
    images: Iterable[object],
    *,
    labels: NDArray[np.int64] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Reference:
    """What a student answers to images, and its constants, to compare files with.

    Args:
        student: as exported.
        images: batches of preprocessed images.
        labels: of them, where known.
        metadata: of the student's run, as a file of it carries them.
    """
    batches = [first_tensor(batch) for batch in images]
    graph, logits = lower(student, metadata), predict(in_integers(student), batches)
    return Reference(
        "PyTorch student",
        tuple(batch.detach().float().cpu().numpy() for batch in batches),
        logits,
        labels,
        output_step(graph, logits),
        sizes_of(graph),
        constants_of(graph),
        graph.metadata,
        operators=operators_of(graph),
    )


@dataclass(frozen=True)
class Rounding:
    """What a quantizer does, in levels (codes less the zero-point).

    Attributes:
        name: of the quantizer.
        step: that reals are divided by.
        low: lowest level.
        high: highest level.
        out_step: that levels are multiplied by.
    """

    name: str
    step: float
    low: int
    high: int
    out_step: float


def roundings(graph: ir.IntegerGraph) -> dict[str, Rounding]:
    """Every quantizer by the name of its traced node, in topological order."""
    found = {}
    for node in graph.nodes:
        if isinstance(node, ir.Quantize):
            grid = _grid(graph, node.output)
            low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
            steps = float(node.step), float(grid.scale)
            found[node.output] = Rounding(node.name, steps[0], low, high, steps[1])
    return found


def record(student: nn.Module, images: NDArray[np.float32]) -> dict[str, Tensor]:
    """The codes of every quantised tensor.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize`.
        images: ``(M, C, H, W)``.

    Returns:
        By the quantizer's name, in topological order; the first axis counts images, also where a
        model parts them into windows.
    """
    return record_exact(in_integers(student), lower(student), images)


@torch.no_grad()
def record_exact(
    student: nn.Module, graph: ir.IntegerGraph, images: NDArray[np.float32]
) -> dict[str, Tensor]:
    """:func:`record` of what :func:`~sqakd_deploy.lowering.exact.in_integers` made, and the
    student's integers."""
    quantizers = {node.output: node for node in graph.nodes if isinstance(node, ir.Quantize)}
    recorder = Recorder(student, quantizers)
    training = student.training
    student.eval()
    device = next(student.parameters()).device
    parts: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in quantizers}
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        recorder.run(torch.from_numpy(chunk).to(device))
        for name in quantizers:
            codes = _codes(first_tensor(recorder.values[name]), _grid(graph, name))
            parts[name].append(_by_image(codes, len(chunk)))
    student.train(training)
    return {
        node.name: _tensor(np.concatenate(parts[name]), _grid(graph, name))
        for name, node in quantizers.items()
    }


def _by_image(codes: NDArray[np.uint8], images: int) -> NDArray[np.uint8]:
    """Codes whose first axis counts images, of such as may hold several rows of each, or one alone
    whose axis was left out."""
    return codes if len(codes) == images else codes.reshape(images, -1, *codes.shape[1:])


def _grid(graph: ir.IntegerGraph, name: str) -> ir.Grid:
    grid = graph.values[name].grid
    assert grid is not None  # Quantize writes no other
    return grid


def _codes(real: torch.Tensor, grid: ir.Grid) -> NDArray[np.uint8]:
    steps = np.rint(real.float().cpu().numpy() / grid.scale)
    return (steps + (grid.zero_point - offset(grid.dtype))).astype(np.uint8)


def _tensor(codes: NDArray[np.uint8], grid: ir.Grid) -> Tensor:
    return Tensor(codes, float(grid.scale), grid.zero_point - offset(grid.dtype))

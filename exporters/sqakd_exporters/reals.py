"""Forms for files whose operators all work on real numbers, between quantizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
from sqakd_exporters.forms import as_moved
from sqakd_exporters.writer import Writer


class RealWriter(Writer):
    """Holds every value as floats; the quantizer of one on a grid has dequantised it already."""

    def _real(self, name: str) -> ir.Value:
        return self._held[name]


def real_bias(writer: Writer, node: g.Conv | g.Linear) -> list[ir.Value]:
    """A layer's bias in float32, if it has one."""
    if node.bias is None:
        return []
    bias = node.bias
    if isinstance(bias, g.IntBias):
        bias = (bias.codes.astype(np.float64) * bias.scale).astype(np.float32)
    return [writer.constant(f"{node.name}/bias", bias)]


def real_select(writer: Writer, node: g.Select) -> None:
    """Slices side by side, for runtimes that move quantizers across those, and no other choice."""
    held, parts = writer.held(node), {}
    runs = list(_runs(node.indices))
    for run in dict.fromkeys(runs):
        start, end = run
        bounds = {"start": start, "end": end, "axis": node.axis}
        name = f"{node.name}/{start}_{end}"
        constants = [writer.integers(f"{name}/{key}", [at]) for key, at in bounds.items()]
        parts[run] = writer.op("Slice", [held, *constants], f"{node.output}/{start}_{end}", name)
    joined = [parts[run] for run in runs]
    output = writer.op("Concat", joined, node.output, node.name, axis=node.axis)
    writer.hold(node, output, writer.grid(node))


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours in a row, each as its first index and the one behind its last."""
    start = end = indices[0]
    for index in indices:
        if index != end:
            yield start, end
            start = index
        end = index + 1
    yield start, end


def real_pad(writer: Writer, node: g.Pad) -> None:
    """Pad with real zeros, or what the image holds."""
    amounts = writer.integers(f"{node.name}/amounts", [*node.before, *node.after])
    if node.mode != "constant":
        as_moved(writer, node, "Pad", amounts, mode=node.mode)
        return
    zero = writer.constant(f"{node.name}/zero", np.array(0.0, np.float32))
    output = writer.op("Pad", [writer.held(node), amounts, zero], node.output, node.name)
    writer.hold(node, output, writer.grid(node))

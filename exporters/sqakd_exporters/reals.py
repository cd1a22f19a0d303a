"""Forms for files whose operators all work on real numbers, between quantizers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqakd_deploy import graph as g
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


def real_pad(writer: Writer, node: g.Pad) -> None:
    """Pad with real zeros."""
    amounts = writer.integers(f"{node.name}/amounts", [*node.before, *node.after])
    zero = writer.constant(f"{node.name}/zero", np.array(0.0, np.float32))
    output = writer.op("Pad", [writer.held(node), amounts, zero], node.output, node.name)
    writer.hold(node, output, writer.grid(node))

"""Which students have integers (those whose every operator has a form), and what they become."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from brevitas.nn import QuantIdentity
from torch import fx, nn

from sqakd_deploy import graph as ir
from sqakd_deploy.lowering.folding import CodeRange
from sqakd_deploy.lowering.ops import read
from sqakd_deploy.quantization import spec_of
from sqakd_deploy.quantizers import ActivationQuantizer
from sqakd_deploy.tracing.trace import describe


@dataclass
class Lowered:
    """An integer graph and where its layers came from.

    Attributes:
        graph: the integers.
        norms: path of the BatchNorm folded into a layer, by the layer's path (its own, where it
            stands alone).
        paths: path of the module of each layer with a bias of its own, by the layer's name: they
            differ where another node took the name.
    """

    graph: ir.IntegerGraph
    norms: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)


def without_form(student: nn.Module) -> str | None:
    """The first operator without an integer form, which was excluded; None where all have one.

    Args:
        student: made by :func:`~sqakd_deploy.quantization.quantize`.

    Raises:
        ModelError: if the module is no student.
    """
    spec_of(student)
    graph: Any = student.graph
    for node in graph.nodes:
        computes = node.op.startswith("call") and quantizer_at(student, node) is None
        if computes and read(node) is None:
            return describe(node)
    return None


def quantizer_at(student: nn.Module, node: fx.Node) -> QuantIdentity | None:
    """The quantizer that a node calls; None where it calls something else."""
    module = student.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, QuantIdentity) else None


def codes_behind(student: nn.Module, user: fx.Node) -> CodeRange | None:
    """The codes of a quantizer that a node calls; None where it calls something else."""
    module = quantizer_at(student, user)
    if module is None:
        return None
    quantizer = next(m for m in module.modules() if isinstance(m, ActivationQuantizer))
    step, zero_point, _ = quantizer.grid()
    return np.float32(step), zero_point, quantizer.steps

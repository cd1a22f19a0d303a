"""Which students have integers: those whose every operator has a form; one without was excluded."""

from __future__ import annotations

from typing import Any

from brevitas.nn import QuantIdentity
from torch import fx, nn

from sqakd_deploy.ops import read
from sqakd_deploy.quantization import spec_of
from sqakd_deploy.tracing import describe


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
        if computes and (read(node) is None or _pads_otherwise(student, node)):
            return describe(node)
    return None


def _pads_otherwise(student: nn.Module, node: fx.Node) -> bool:
    module = student.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.Conv2d) and module.padding_mode != "zeros"


def quantizer_at(student: nn.Module, node: fx.Node) -> QuantIdentity | None:
    """The quantizer that a node calls; None where it calls something else."""
    module = student.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, QuantIdentity) else None

"""Whether integer kernels can saturate on CPUs without VNNI, decided from the numbers alone.

Without VNNI, x86 multiplies uint8 activations by int8 weights with ``vpmaddubsw``: two neighbouring
products are added in int16, which saturates. A layer is immune if no pair can leave int16:

    max_act · (w1 + w2) ≤ 32767   and   max_act · (w1 + w2) ≥ −32768

for the two largest weights of one sign in any output channel (``docs/runtime-rules.md``, rule 19).
Which weights are neighbours is the kernel's affair, so the worst pair decides: "immune" is proven,
"can saturate" is possible. int8 activations are shifted to uint8 by such kernels, and count as
that. Activations count by their codes, zero-point included, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.cpu import Vnni, this_cpu
from sqakd_deploy.errors import SpecError
from sqakd_deploy.graph import IntegerGraph, IntWeight
from sqakd_deploy.spec import SPEC_KEY, QuantSpec
from sqakd_deploy.verification import constants as c
from sqakd_deploy.verification.file import QdqFile
from sqakd_deploy.verification.onnx_layers import OnnxFile
from sqakd_deploy.words import counted

_LIMIT = 32767
_PIXEL = 255  # the largest raw one


@dataclass(frozen=True)
class LayerSaturation:
    """An integer layer's worst pair of products.

    Attributes:
        layer: its name.
        max_act: largest code of its input, as uint8.
        pair: sum of the two weights that go farthest.
        sum: ``max_act · pair``; int16 holds −32768 to 32767.
        immune: whether it fits.
    """

    layer: str
    max_act: int
    pair: int
    sum: int
    immune: bool


@dataclass(frozen=True)
class SaturationReport:
    """All integer layers of a file.

    Attributes:
        layers: in the file's order.
        cpu: what this machine is.
        target: that the file was written for; None if it is not known.
        cure: what keeps a student of that kind from it; empty where no option does.
    """

    layers: tuple[LayerSaturation, ...]
    cpu: Vnni
    target: str | None = None
    cure: str = field(default_factory=lambda: cure_for(None))

    @property
    def at_risk(self) -> list[str]:
        """Layers that are not immune."""
        return [layer.layer for layer in self.layers if not layer.immune]

    @property
    def suspicion(self) -> str:
        """What may be behind answers that differ here in a runtime that saturates; or nothing."""
        if self.cpu != "no vnni" or not self.at_risk:
            return ""
        return (
            f"this CPU has no VNNI, and sums can saturate in {_some(self.at_risk)} (rule 19 of "
            "docs/runtime-rules.md)" + (f": {self.cure}" if self.cure else "")
        )

    @property
    def summary(self) -> str:
        """What it means, in a line."""
        at_risk = self.at_risk
        if not self.layers:
            return "saturation without VNNI: no layer has integer weights and inputs"
        if not at_risk:
            layers = "all " * (len(self.layers) > 1) + counted(len(self.layers), "integer layer")
            return (
                f"saturation without VNNI: impossible in {layers}; "
                "the answers are the same on every x86 CPU"
            )
        layers = counted(len(self.layers), "integer layer")
        parts = (
            f"possible in {len(at_risk)} of {layers} ({_some(at_risk)})"
            + (_EXACT if self.target in _OF_ONNX_RUNTIME else ""),
            self.cure,
            _MEANING[self.cpu],
        )
        return f"saturation without VNNI: {'; '.join(filter(None, parts))}"


def _some(layers: list[str]) -> str:
    return ", ".join(layers[:4]) + (", …" if len(layers) > 4 else "")


_OF_ONNX_RUNTIME = (None, "onnxruntime")
_EXACT = (
    ", but in ONNX Runtime with session.x64quantprecision set to 1, as this package sets it there"
)
_ODD = ("pact", "dorefa", "ewgs")  # methods whose codes have no zero: a bit more holds them
_SEVEN_AT_ENDS = "openvino"  # a target that gives the first and last layers no more


def cure_for(spec: QuantSpec | None) -> str:
    """What keeps integer kernels from saturating, of what a student's spec does not have yet.

    Args:
        spec: the student's, with the file's target; None where it is not known.

    Returns:
        What to do, with options of ``train``; empty if none of them is left.
    """
    if spec is None:
        return (
            "weights of fewer bits cannot (--first-last-bits 7; of inner layers --bits w7a8, or "
            "w6a8 with pact, dorefa and ewgs)"
        )
    most = 6 if spec.weights.method in _ODD else 7
    options = []
    if spec.target != _SEVEN_AT_ENDS and spec.first_last_bits > most:
        options.append(f"--first-last-bits {most}")
    if spec.weights.bits > most:
        options.append(f"--bits w{most}a{spec.activations.bits}")
    if spec.layer_bits:
        options.append(f"--layer-bits of at most w{most}")
    return f"weights of fewer bits cannot ({', '.join(options)})" if options else ""


_MEANING: Mapping[Vnni, str] = {
    "vnni": "this CPU has VNNI and does not saturate",
    "no vnni": "this CPU has no VNNI, so this matters here",
    "unknown": "whether this CPU has VNNI cannot be told",
    "not x86": "not applicable to this CPU, which is not x86",
}


def saturation_of(file: OnnxFile, cpu: Vnni | None = None) -> SaturationReport:
    """Decide for every layer with 8-bit inputs and integer weights.

    Args:
        file: the file; only QDQ files have such layers.
        cpu: None asks this machine.
    """
    cpu = this_cpu() if cpu is None else cpu
    if not isinstance(file, QdqFile):
        return SaturationReport((), cpu)
    cure = cure_for(_spec(file))
    facts, inputs = file.constants, file.inputs_of_layers()
    layers = []
    for name, numbers in facts.items():
        if c.WEIGHT_CODES not in numbers:
            continue
        if name in inputs:
            read = [part for source in inputs[name] for part in _parts(source, facts)]
            highest = max(int(facts[part][c.HIGHEST]) for part in read)
        elif file.takes_codes:
            highest = _PIXEL  # the first layer: its codes are raw pixels
        else:
            continue
        layers.append(_layer(name, numbers[c.WEIGHT_CODES], highest))
    return SaturationReport(tuple(layers), cpu, file.target, cure)


def _spec(file: OnnxFile) -> QuantSpec | None:
    """What a file says of its student, with its own target; None if it says nothing known here."""
    stated = file.stated(SPEC_KEY)
    if not isinstance(stated, dict):
        return None
    try:
        return QuantSpec.parse(stated | {"target": file.target})
    except SpecError:  # another version's
        return None


def saturation_in(graph: IntegerGraph, spec: QuantSpec | None = None) -> SaturationReport:
    """The same of a student's integers, whatever the format of its file.

    Args:
        graph: of the student.
        spec: the student's, with the file's target.
    """
    layers = []
    for node in graph.nodes:
        weight = getattr(node, "weight", None)
        grid = graph.values[node.inputs[0]].grid if node.inputs else None
        if isinstance(weight, IntWeight) and grid is not None:
            layers.append(_layer(node.name, weight.codes, grid.qmax - c.offset(grid.dtype)))
    target = None if spec is None else spec.target
    return SaturationReport(tuple(layers), this_cpu(), target, cure_for(spec))


def sums_exactly(runtime: object) -> bool:
    """Whether a runtime's plugin says that its sums saturate nowhere (``exact_sums``)."""
    return bool(getattr(runtime, "exact_sums", False))


def _parts(quantizer: str, facts: Container[str]) -> list[str]:
    """A quantizer, or those of the parts of a concatenation that stand for it."""
    return [quantizer] if quantizer in facts else c.parts_of(quantizer, facts)


def _layer(name: str, codes: NDArray[np.int8], max_act: int) -> LayerSaturation:
    pair = worst_pair(codes)
    worst = pair * max_act
    return LayerSaturation(name, max_act, pair, worst, -_LIMIT - 1 <= worst <= _LIMIT)


def worst_pair(codes: NDArray[np.int8]) -> int:
    """The sum, largest in size, of two weights of one sign in one output channel.

    Args:
        codes: ``(O, …)``; a channel of one weight has no pair, and counts it alone.
    """
    rows = codes.reshape(len(codes), -1).astype(np.int64)
    if rows.shape[1] == 1:
        rows = np.pad(rows, ((0, 0), (0, 1)))
    ordered = np.partition(rows, (1, -2), axis=1) if rows.shape[1] > 2 else np.sort(rows, axis=1)
    low = int(np.minimum(ordered[:, :2], 0).sum(axis=1).min())
    high = int(np.maximum(ordered[:, -2:], 0).sum(axis=1).max())
    return low if -low > high else high

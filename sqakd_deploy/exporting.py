"""What an exporter and a runtime are; :mod:`sqakd_deploy.plugins` finds those installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sqakd_deploy.errors import SpecError
from sqakd_deploy.graph import IntegerGraph
from sqakd_deploy.spec import QuantSpec


@dataclass(frozen=True)
class PlacementRules:
    """Where a target needs quantizers; read by :mod:`sqakd_deploy.placement` before training.

    Attributes:
        quantize_edges: every tensor between layers is quantised (residual stream, pools,
            concatenations, output). False quantises only what convolutions and linears read.
        quantize_first_last: the first and last layers are quantised too.
        fuse_sums: the target adds inside a convolution's kernel, before anything is rounded: one
            input of an Add that is a convolution's own output (BatchNorm folded) stays float.
        fuse_scaled: with ``fuse_sums``, a factor for each channel counts as a convolution: it is
            written as a depthwise one.
        symmetric: activations are int8 with zero-point 0, whatever their sign.
        quantize_output: the model's output is quantised; False leaves it in float, whatever the
            spec says.
        smallest_matmul: linear layers with fewer inputs or outputs stay in float.
        integer_products: products of two activations (attention) multiply codes.
        widest_ends: bits that hold the codes of the first and last layers' weights, at most.
    """

    quantize_edges: bool = True
    quantize_first_last: bool = True
    fuse_sums: bool = False
    fuse_scaled: bool = False
    symmetric: bool = False
    quantize_output: bool = True
    smallest_matmul: int = 0
    integer_products: bool = True
    widest_ends: int = 8

    def end_bits(self, asked: int, *, odd: bool) -> int:
        """Bits of the first and last layers' weights.

        Args:
            asked: by the spec.
            odd: codes are odd, those of a grid without zero, which takes one bit more to hold.
        """
        return min(asked, self.widest_ends - (odd and self.widest_ends < 8))


PAPER_PLACEMENT = PlacementRules(quantize_edges=False, quantize_first_last=False)


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written.

    Attributes:
        opset: ONNX opset; None takes the lowest that can express the file.
        input_name: name of the graph's input.
        output_name: name of the graph's output.
        pack: store weights below 8 bits at their own width; None does so where the target can
            restore them and the file gets smaller, True also refuses what stands in the way.
        input_type: ``float32`` for preprocessed images, ``uint8`` for raw pixels 0 to 255, which
            the file normalises itself (:mod:`sqakd_deploy.pixels`).
        input_layout: ``nchw``, or for raw pixels ``nhwc``.
        batch: images in a batch; None leaves it open.

    Raises:
        SpecError: if a value is out of range.
    """

    opset: int | None = None
    input_name: str = "input"
    output_name: str = "logits"
    pack: bool | None = None
    input_type: Literal["float32", "uint8"] = "float32"
    input_layout: Literal["nchw", "nhwc"] = "nchw"
    batch: int | None = None

    def __post_init__(self) -> None:
        for field_name in ("input_name", "output_name"):
            if not getattr(self, field_name).strip():
                raise SpecError(f"{field_name}: wanted a name, got an empty one")
        if self.input_name == self.output_name:
            raise SpecError(
                f"input_name, output_name: wanted two names, got {self.input_name!r} for both"
            )
        if self.input_type not in ("float32", "uint8"):
            raise SpecError(f"input: wanted float32 or uint8, got {self.input_type!r}")
        if self.input_layout not in ("nchw", "nhwc"):
            raise SpecError(f"input_layout: wanted nchw or nhwc, got {self.input_layout!r}")
        if self.input_layout == "nhwc" and self.input_type != "uint8":
            raise SpecError("input_layout: nhwc is for raw pixels; ask for uint8 input as well")
        if self.batch is not None and self.batch < 1:
            raise SpecError(f"batch: wanted at least 1, or None for any, got {self.batch}")


@dataclass(frozen=True)
class Artifact:
    """A written file.

    Attributes:
        path: where it is.
        exporter: who wrote it.
        size: bytes on disk, companions included.
        companions: files beside it that belong to it, named like it but for the suffix.
        input_form: a line on what it is fed and where normalisation happens.
    """

    path: Path
    exporter: str
    size: int
    companions: tuple[Path, ...] = ()
    input_form: str = ""


@dataclass(frozen=True)
class FloatFallback:
    """A layer that the runtime computes in float.

    Attributes:
        node: its name in the file.
        op_type: its operator.
        reason: why it is not integer.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Which layers a session really runs in integers.

    Attributes:
        integer: count by operator (``Conv``, ``Gemm``, ``Add``, …) of those in integers.
        total: count by operator of all.
        fallbacks: those in float, each with its reason.
        packed: count of layers whose weights the file stores in less than a byte each; None where
            the format has weights as reals.
        unfolded: nodes that should have restored packed weights at load, but run every time.
    """

    integer: Mapping[str, int]
    total: Mapping[str, int]
    fallbacks: tuple[FloatFallback, ...] = field(default=())
    packed: int | None = 0
    unfolded: tuple[str, ...] = ()


@runtime_checkable
class Session(Protocol):
    """An opened file, ready to run."""

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits ``(N, K)`` of preprocessed images ``(N, C, H, W)``."""
        ...

    def coverage(self) -> Coverage:
        """Which layers run in integers."""
        ...


@runtime_checkable
class ShapedSession(Session, Protocol):
    """A session that knows its input, which ``bench`` needs for files that are not ONNX.

    Attributes:
        input_shape: ``(N, C, H, W)``, None where an extent is dynamic.
    """

    input_shape: tuple[int | None, ...]


@runtime_checkable
class Runtime(Protocol):
    """Opens files of one format.

    Attributes:
        name: as in the entry point.
    """

    name: str

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> Session:
        """Load a file.

        Args:
            path: the file.
            optimize: let the runtime rewrite the graph; False runs it as written.
            threads: intra-operator threads; None leaves the runtime's default.

        Raises:
            ExportError: if the runtime refuses the file.
        """
        ...


STAGES: Mapping[str, bool] = {"optimisations off": False, "optimisations on": True}
"""What a proof runs: values of ``optimize`` by the stage's name."""


@runtime_checkable
class StagedRuntime(Runtime, Protocol):
    """A runtime for which the names in :data:`STAGES` would be wrong.

    Attributes:
        stages: as :data:`STAGES`; the last is how the file is deployed.
    """

    stages: Mapping[str, bool]


@runtime_checkable
class Exporter(Protocol):
    """Writes integer graphs for one target.

    Attributes:
        name: as in the entry point; also the target's name.
        summary: one line for ``sqakd-deploy list``.
        runtime: name of the runtime that proves its files.
        placement: the target's rules.
    """

    name: str
    summary: str
    runtime: str
    placement: PlacementRules

    def check(self, spec: QuantSpec) -> None:
        """Refuse, before any work starts, what the target cannot run.

        Raises:
            SpecError: if it cannot.
        """
        ...

    def export(self, graph: IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        """Write the file at exactly ``path``, whole or not at all.

        Raises:
            ExportError: if a node cannot be written, naming it.
        """
        ...


@dataclass(frozen=True)
class RuleCheck:
    """A documented rule of a runtime, and whether a file keeps it.

    Attributes:
        rule: its number in ``docs/runtime-rules.md``.
        says: what it says.
        source: who documents it.
        broken: where it is broken, each with what was found; empty if it is held.
    """

    rule: str
    says: str
    source: str
    broken: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether the file keeps it."""
        return not self.broken


@dataclass(frozen=True)
class Conformance:
    """A file against the documented rules of a runtime that it was not run in.

    Attributes:
        runtime: the runtime's name, for people.
        checks: every rule.
    """

    runtime: str
    checks: tuple[RuleCheck, ...]

    @property
    def statement(self) -> str:
        """What is known, and what is not."""
        broken = sum(not check.held for check in self.checks)
        found = f"{broken} broken" if broken else "all held"
        against = f"checked against {len(self.checks)} documented rules, {found}"
        return f"not run in {self.runtime}; {against}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        checks = [asdict(check) | {"held": check.held} for check in self.checks]
        return {"runtime": self.runtime, "statement": self.statement, "checks": checks}

    @property
    def failures(self) -> list[str]:
        """Broken rules, a line each."""
        return [
            f"rule {check.rule} ({check.says}) is broken: {'; '.join(check.broken)}"
            for check in self.checks
            if not check.held
        ]


PROFILE_KEY = "sqakd.profile"
"""Metadata: that a file was not run in the runtime it was written for, and which that is."""


CONVERSION_KEY = "sqakd.conversion"
"""Metadata: what options, beside those of its input, an ONNX file was written with that was then
converted, and by which version of this package."""


@runtime_checkable
class ProfileExporter(Exporter, Protocol):
    """An exporter for a runtime that files are not run in: its rules are checked instead.

    Attributes:
        deployed_in: that runtime's name, for people. ``runtime`` still names the one that shows
            that a file is its student.
    """

    deployed_in: str

    def conformance(self, path: Path) -> tuple[RuleCheck, ...]:
        """Check every documented rule on a written file, whoever wrote it.

        Raises:
            ExportError: if it cannot be read.
        """
        ...


def conformance_of(exporter: Exporter, path: Path) -> Conformance | None:
    """What an exporter's rules say of a file; None where its files are really run."""
    if not isinstance(exporter, ProfileExporter):
        return None
    return Conformance(exporter.deployed_in, exporter.conformance(path))


def named_stages(runtime: Runtime) -> dict[str, bool]:
    """What a proof in a runtime runs: values of ``optimize`` by runtime and stage, for people."""
    stages = runtime.stages if isinstance(runtime, StagedRuntime) else STAGES
    return {f"{runtime.name}, {name}": optimize for name, optimize in stages.items()}

"""Tables of what a comparison found, for people; free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from sqakd_deploy.exporting import Conformance, FloatFallback
from sqakd_deploy.verification.isolated import SIMULATED, IsolatedReport
from sqakd_deploy.verification.saturation import SaturationReport
from sqakd_deploy.verification.stages import ParityReport, isolated_faults
from sqakd_deploy.words import counted

_FEW_IMAGES = 100
"""One of fewer is more than a percent."""


def percent(value: float | None) -> str:
    """``98.61 %``, or a dash where there is none."""
    return "—" if value is None else f"{value:.2f} %"


def kib(size: int) -> str:
    """Bytes in KiB, or MiB from 10 on."""
    return f"{size / 1024:.1f} KiB" if size < 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def parity_table(report: ParityReport) -> Table:
    """The stages of a comparison."""
    title = f"Parity on {counted(report.samples, 'image')}"
    table = Table(title=title, title_justify="left")
    for heading in ("stage", "top-1", "agreement", "largest error", "mean error"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in report.stages:
        table.add_row(
            stage.name,
            percent(stage.top1),
            percent(stage.agreement),
            f"{stage.max_error:.2f} steps",
            f"{stage.mean_error:.4f} steps",
        )
    return table


def parity_lines(report: ParityReport) -> list[str]:
    """What the figures of a comparison mean, a line each."""
    lines = [f"one step = {report.output_step:.4g} ({report.output_step_source})"]
    if report.samples < _FEW_IMAGES:
        lines.append(
            f"{counted(report.samples, 'image')} alone: what differs in one of a hundred may not "
            "be among them"
        )
    if report.answers == 1 and report.samples > 1:
        lines.append("all images get one answer: agreement shows nothing here, errors do")
    if report.ties:
        tie = f"the student's largest logits tie in {counted(report.ties, 'image')}"
        lines.append(f"{tie}: any of those answers is its own")
    if report.explained:
        lines.append(
            "where one image is answered otherwise, a value lies on the border of two codes: each "
            "layer is right on the codes that the runtime computed for it"
        )
    if report.exact:
        lines.append(f"bit for bit the student's logits: {'; '.join(report.exact)}")
    if any(stage.only_rounding and stage.differing > 1 for stage in report.stages):
        lines.append(
            "without optimisations sums are float32's: each layer is right on the codes before it, "
            "and how far the network carries their rounding is not counted"
        )
    return lines


def conformance_table(conformance: Conformance) -> Table:
    """Each documented rule, and where it is broken."""
    title = f"Documented rules of {conformance.runtime}, which the file was not run in"
    table = Table(title=title, title_justify="left")
    for heading in ("rule", "says", "documented by", "", "where"):
        table.add_column(heading)
    for check in conformance.checks:
        verdict = "held" if check.held else "broken"
        table.add_row(check.rule, check.says, check.source, verdict, "\n".join(check.broken))
    return table


def coverage_lines(report: ParityReport) -> list[str]:
    """Integer coverage and float fall-backs, a line each; of a profile, what is not known."""
    if report.conformance is not None:
        unknown = f"which layers {report.conformance.runtime} runs in integers is not known"
        return [report.conformance.statement, unknown, *_other_lines(report), *_size_lines(report)]
    counts = ", ".join(
        f"{report.coverage.integer.get(op, 0)} of {total} {op}"
        for op, total in sorted(report.coverage.total.items())
    )
    lines = [f"in integers: {counts}"]
    lines += _float_lines(report.coverage.fallbacks)
    if any("(rule " in fallback.reason for fallback in report.coverage.fallbacks):
        lines.append(_RULES)
    lines += [f"not folded at load, runs every time: {name}" for name in report.coverage.unfolded]
    return [*lines, *_other_lines(report), *_size_lines(report)]


def _other_lines(report: ParityReport) -> list[str]:
    """What stands beside the proof: runtimes that decide nothing, or took no part."""
    lines = [
        f"shown, decides nothing: {stage.name}: the file was not placed for it; "
        f"--runtime {stage.name} makes its answers count"
        for stage in report.stages
        if not stage.decides
    ]
    return lines + [f"took no part: {name}: {reason}" for name, reason in report.skipped.items()]


_RULES = "rules are explained in docs/runtime-rules.md of sqakd-deploy's sources"

_LISTED = 10
"""Faults in what people read; --json has all."""

_FEW = 3
"""More fall-backs than this, of one kind for one reason, share a line."""


def _float_lines(fallbacks: Iterable[FloatFallback]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for fallback in fallbacks:
        groups.setdefault((fallback.op_type, fallback.reason), []).append(fallback.node)
    lines = []
    for (kind, reason), nodes in groups.items():
        if len(nodes) > _FEW:
            lines.append(f"in float: {len(nodes)} {kind} ({nodes[0]} to {nodes[-1]}): {reason}")
        else:
            lines += [f"in float: {node} ({kind}): {reason}" for node in nodes]
    return lines


def _size_lines(report: ParityReport) -> list[str]:
    """What the file takes, and how far that is from what its numbers need."""
    if report.float_size is None or report.information_size is None:
        return [f"size: {kib(report.size)}"]
    lines = []
    if report.coverage.packed is None:
        lines.append("weights: reals on the grids of their bits, four bytes each in this format")
    elif report.narrow_layers:
        lines.append(_packed_line(report, report.coverage.packed, report.narrow_layers))
    ratio = report.float_size / report.size
    over = 100 * (report.size / report.information_size - 1)
    lines.append(
        f"size: {kib(report.size)}, {over:.1f} % over {kib(report.information_size)} of weights at "
        f"their bits, scales and biases; {kib(report.float_size)} in fp32 ({ratio:.2f}×)"
    )
    if report.graph_size is not None:
        lines.append(f"of that the graph, as text in the .xml, takes {kib(report.graph_size)}")
    return lines


def _packed_line(report: ParityReport, packed: int, narrow: int) -> str:
    """Layers by what each of their weights takes; those of an older reference are not all known."""
    floats, whole = report.float_layers or 0, narrow - packed + (report.byte_layers or 0)
    if not packed:
        line = f"weights: a byte each, also in {counted(narrow, 'layer')} below 8 bits"
        return f"{line}; {floats} in float" if floats else line
    line = f"packed: weights of {packed} of {counted(narrow, 'layer')} below 8 bits"
    if whole:
        line += f"; {whole} a byte each" if floats else "; the others a byte each"
    return f"{line}; {floats} in float" if floats else line


def constants_lines(
    report: ParityReport, *, known: bool = True, unknown: str | None = None
) -> list[str]:
    """Whether constants, and layers on the runtime's own codes, are the student's; what is not.

    Args:
        report: of the comparison.
        known: whether the student's are.
        unknown: why layers were not compared, of OpenVINO IR, nor constants if they are None.
    """
    wrong = [f"wrong: {difference}" for difference in report.metadata]
    wrong += first_of(isolated_faults(report.isolated)) or _right_layers(report.isolated)
    if unknown is not None:
        what = "constants and layers" if report.constants is None else "layers"
        wrong.append(f"{what}: not compared, since {unknown}")
    if report.constants:
        named = [f"wrong constant: {difference}" for difference in report.constants]
        return [*first_of(named), *wrong]
    if report.constants is not None:
        return ["constants: all those of the student", *wrong]
    if unknown is not None:
        return wrong
    why = "the file is neither QDQ nor QONNX" if known else "only answers are known"
    return [f"constants: not compared, since {why}", *wrong]


def first_of(lines: list[str]) -> list[str]:
    """The first few lines, and how many more there are."""
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], f"and {more} more: see --json"] if more > 1 else lines


def _right_layers(isolated: Mapping[str, IsolatedReport]) -> list[str]:
    """What layers without a fault come to, in a line; none where they were not compared."""
    of_runtimes = {stage: part for stage, part in isolated.items() if stage != SIMULATED}
    if not of_runtimes:
        return []
    deciding = [part for part in of_runtimes.values() if part.decides]
    some = next(iter(deciding or of_runtimes.values()))
    where = f"on the runtime's own codes ({which_images(some.images)})"
    stages = ", ".join(stage for stage, part in isolated.items() if not part.decides)
    unread = f"not all can be read at once ({stages})" if stages else ""
    if not deciding:
        return [f"layers: nothing decided {where}: {unread}"]
    moved = [f"{p.differing} ({s})" for s, p in isolated.items() if p.decides and p.differing]
    border = f"; of {some.codes} codes so many lay on a border and fell the other way: "
    ties = border + ", ".join(moved) if moved else ""
    right = f"layers: all {len(some.tensors)} quantised tensors are the student's {where}{ties}"
    right += copies(max(part.moved for part in deciding))
    return [f"{right}; elsewhere {unread}" if unread else right]


def copies(moved: float) -> str:
    """That codes were read from copies of the file that are not the same to the bit."""
    return f"; read from copies whose answers differ by up to {moved:.1e} steps" if moved else ""


def which_images(count: int, saved: Sequence[int] | None = None) -> str:
    """Images that layers were run on, in words.

    Args:
        count: of them.
        saved: indices of those that a saved reference has tensors of; None are those that differ
            most.
    """
    if count == 1:
        return "one image"
    if saved is None:
        return f"the {count} images that differ most"
    if list(saved[:count]) == list(range(count)):
        return f"the first {count} images"
    some = f"the {count}" if count == len(saved) else f"the first {count}"
    return f"{some} images that the reference has tensors of"


def saturation_table(report: SaturationReport) -> Table:
    """Each integer layer's worst pair of products without VNNI."""
    table = Table(title="Pairs of products in int16, on CPUs without VNNI", title_justify="left")
    for name in ("layer", "largest input", "worst weight pair", "sum", "int16"):
        table.add_column(name, justify="left" if name in ("layer", "int16") else "right")
    for layer in report.layers:
        fits = "immune" if layer.immune else "can saturate"
        figures = (layer.max_act, layer.pair, layer.sum)
        table.add_row(layer.layer, *(f"{figure}" for figure in figures), fits)
    return table

"""What a comparison found, as a person reads it: tables, and the lines below them."""

from __future__ import annotations

from rich.table import Table

from sqakd_deploy.consoles import WIDTH
from sqakd_deploy.verification.layer_tables import layers_lines, layers_parts
from sqakd_deploy.verification.reference import Reference
from sqakd_deploy.verification.stages import ParityReport
from sqakd_deploy.verification.tables import (
    conformance_table,
    constants_lines,
    coverage_lines,
    parity_lines,
    parity_table,
    saturation_table,
    which_images,
)
from sqakd_deploy.verification.verifying import Verification

_SAVED = "saved reference"  # what one that was read from a file is called


def parity_parts(report: ParityReport) -> list[Table | str]:
    """What an export shows of its proof."""
    return [*_stages(report), *constants_lines(report), *coverage_lines(report)]


def verification_parts(report: Verification, width: int = WIDTH) -> list[Table | str]:
    """What a verification shows.

    Args:
        report: what was found.
        width: of the paper (characters).
    """
    parity, layers = report.parity, report.layers
    undecided = [stage.name for stage in parity.stages if not stage.decides]
    parts = _stages(parity)
    lines = constants_lines(
        parity, known=report.reference.constants is not None, unknown=report.unknown
    )
    lines += coverage_lines(parity)
    if layers is not None:
        which = which_images(layers.images, _saved(report.reference))
        parts += layers_parts(layers, width, undecided, which)
    # a profile's runtime does not run on x86; of IR, a conversion of the student tells its sums
    if parity.conformance is None and report.unknown is None:
        parts += [saturation_table(report.saturation)] if report.saturation.layers else []
        lines.append(report.saturation.summary)
    return [*parts, *lines, *(layers_lines(layers, undecided) if layers is not None else [])]


def _saved(reference: Reference) -> list[int] | None:
    """Of which images a saved reference has tensors; a student's are of those that differ most."""
    if reference.name != _SAVED or reference.tensor_images is None:
        return None
    return [int(index) for index in reference.tensor_images]


def _stages(report: ParityReport) -> list[Table | str]:
    """The stages and what they mean, and the rules of a profile."""
    parts: list[Table | str] = [parity_table(report), *parity_lines(report)]
    return parts if report.conformance is None else [*parts, conformance_table(report.conformance)]

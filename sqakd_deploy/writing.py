"""A student into a file of some target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from sqakd_deploy.abilities import accumulator_bits_of, packs_of
from sqakd_deploy.errors import SpecError
from sqakd_deploy.exporting import PROFILE_KEY, Artifact, ExportOptions, ProfileExporter
from sqakd_deploy.lowering.accumulators import check_accumulators
from sqakd_deploy.lowering.integer import lower
from sqakd_deploy.pixels import fed_as
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.quantization import spec_of
from sqakd_deploy.retargeting import TARGET_KEY, check_target


def write(
    student: nn.Module,
    path: Path,
    target: str | None,
    anyway: bool,
    options: ExportOptions | None,
    metadata: Mapping[str, str] | None,
) -> Artifact:
    """Write a student's file, with what it is for among its metadata.

    Args:
        student: trained or calibrated.
        path: of the file, whose name its target has.
        target: another target than the student was trained for.
        anyway: write for it even where its rules would have placed quantizers otherwise.
        options: opset, names, packing, kind of input and batch.
        metadata: strings that travel in the file, beside the spec.

    Raises:
        ExportError: if a layer cannot be written, or sums beyond its runtime's integers, naming it.
        SpecError: if target, options and metadata do not go together.
    """
    spec, options = spec_of(student), options or ExportOptions()
    exporter = get_exporter(target or spec.target)
    if options.pack and not packs_of(exporter):
        raise SpecError(
            f"target {exporter.name!r} does not restore packed weights at load; leave out --pack"
        )
    facts = dict(metadata or {})
    if isinstance(exporter, ProfileExporter):
        facts[PROFILE_KEY] = json.dumps({"runtime": exporter.deployed_in, "run": False})
    if exporter.name != spec.target:
        exporter.check(spec.model_copy(update={"target": exporter.name}))
        check_target(lower(student), get_exporter(spec.target), exporter, anyway=anyway)
        facts[TARGET_KEY] = json.dumps(exporter.name)
    graph = lower(student, facts)
    check_accumulators(graph, accumulator_bits_of(exporter))
    graph, form = fed_as(graph, options)
    return replace(exporter.export(graph, path, options), input_form=form)

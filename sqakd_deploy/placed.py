"""By which rules a run's quantizers were placed: a student read by others would be another."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqakd_deploy.checkpoint import Run
from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.exporting import PlacementRules
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.spec import QuantSpec

FACT = "placement"
"""What ``run.json`` calls them."""

_BEFORE = {"widest_ends": 8}  # what runs followed that do not say
_DEFAULTS = asdict(PlacementRules())  # of a rule that there was not yet


def rules_of(spec: QuantSpec) -> dict[str, Any]:
    """The rules that a spec's quantizers are placed by; the paper's never change."""
    return asdict(get_exporter(spec.target).placement) if spec.placement == "target" else {}


def check_rules(run: Run) -> None:
    """Refuse a student that today's rules would read as another one.

    Raises:
        CheckpointError: with what differs, or if what is kept are no rules.
    """
    spec = run.config.quantization
    now, kept = rules_of(spec), run.facts.get(FACT)
    if kept is not None and not isinstance(kept, dict):
        raise CheckpointError(f"run {run.path} is damaged: {FACT} in run.json holds no rules")
    then = now | _BEFORE if kept is None else _DEFAULTS | kept
    changed = ", ".join(
        f"{name} {then[name]}, now {rule}" for name, rule in now.items() if then[name] != rule
    )
    if not changed:
        return
    raise CheckpointError(
        f"run {run.path} was placed by other rules of target {spec.target!r} ({changed}): read by "
        "today's, it would be another student; train it again, or use the version that made it"
    )

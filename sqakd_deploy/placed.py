"""By which rules a run's quantizers were placed: a student read by others would be another."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqakd_deploy.checkpoint import Run
from sqakd_deploy.errors import CheckpointError
from sqakd_deploy.plugins import get_exporter
from sqakd_deploy.spec import QuantSpec

FACT = "placement"
"""What ``run.json`` calls them."""

_BEFORE = {"widest_ends": 8}  # what runs followed that do not say


def rules_of(spec: QuantSpec) -> dict[str, Any]:
    """The rules that a spec's quantizers are placed by; the paper's never change."""
    return asdict(get_exporter(spec.target).placement) if spec.placement == "target" else {}


def check_rules(run: Run) -> None:
    """Refuse a student that today's rules would read as another one.

    Raises:
        CheckpointError: with what differs.
    """
    spec = run.config.quantization
    now = rules_of(spec)
    then = now | _BEFORE if now and FACT not in run.facts else run.facts.get(FACT, now)
    if then == now:
        return
    names = [name for name in now if then.get(name) != now[name]]
    changed = ", ".join(f"{name} {then.get(name)}, now {now[name]}" for name in names)
    raise CheckpointError(
        f"run {run.path} was placed by other rules of target {spec.target!r} ({changed}): read by "
        "today's, it would be another student; train it again, or use the version that made it"
    )

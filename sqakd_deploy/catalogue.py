"""What there is to choose from; torch, which takes seconds, for methods and models alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from rich.table import Table

from sqakd_deploy.consoles import console, print_json, show

_OTHER_MODELS = (
    "other models: timm:NAME, where timm is installed; file.py:function or package.module:function "
    "for your own"
)


def _methods() -> dict[str, str]:
    from sqakd_deploy.quantizers import METHODS

    return {name: method.summary for name, method in METHODS.items()}


def _models() -> dict[str, str]:
    from sqakd_deploy.models import MADE_FOR, list_models

    return {
        name: f"built in, for {MADE_FOR[name]}" if name in MADE_FOR else "torchvision"
        for name in list_models()
    }


def _datasets() -> dict[str, str]:
    from sqakd_deploy.data import DATASETS

    return {name: dataset.summary for name, dataset in DATASETS.items()}


def _targets() -> dict[str, str]:
    from sqakd_deploy.plugins import exporters

    return {name: exporter.summary for name, exporter in sorted(exporters().items())}


_GROUPS: Mapping[str, Callable[[], dict[str, str]]] = MappingProxyType(
    {"methods": _methods, "models": _models, "datasets": _datasets, "targets": _targets}
)


def list_all(kind: str | None, as_json: bool) -> None:
    """Print names, each with a line about it.

    Args:
        kind: of what; None for everything, but for what needs a package that is not installed:
            that is named on stderr.
        as_json: as JSON.

    Raises:
        ModuleNotFoundError: if the kind that is asked for needs a package that is not installed.
    """
    groups = {kind: _GROUPS[kind]()} if kind else _all_groups()
    if as_json:
        print_json(groups)
        return
    show(console(), listing(groups))
    if "models" in groups:
        show(console(), [_OTHER_MODELS])


def _all_groups() -> dict[str, dict[str, str]]:
    groups = {}
    for name, group in _GROUPS.items():
        try:
            groups[name] = group()
        except ModuleNotFoundError as error:
            line = f"{name}: not listed, since {error.name or error} is not installed"
            show(console(stderr=True), [line])
    return groups


def listing(groups: Mapping[str, Mapping[str, str]]) -> list[Table]:
    """Names with a line about each, a table a group."""
    tables = []
    for title, rows in groups.items():
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, summary in rows.items():
            table.add_row(name, summary)
        tables.append(table)
    return tables

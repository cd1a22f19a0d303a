"""How installed exporters and runtimes are found.

This package imports no exporter. Distributions announce theirs as entry points in the groups
``sqakd_deploy.exporters`` and ``sqakd_deploy.runtimes``; ``exporters/README.md`` shows how.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sqakd_deploy.abilities import FormalExporter
from sqakd_deploy.errors import SpecError, UnavailableError
from sqakd_deploy.exporting import Exporter, Runtime
from sqakd_deploy.registry import unknown_name

EXPORTERS = "sqakd_deploy.exporters"
RUNTIMES = "sqakd_deploy.runtimes"

Plugin = TypeVar("Plugin")


def exporters(entries: Iterable[EntryPoint] | None = None) -> dict[str, Exporter]:
    """Installed exporters by name; a broken one warns and is left out.

    Those that lack a package are left out, too, without a warning: see
    :class:`~sqakd_deploy.errors.UnavailableError`.

    Args:
        entries: the entry points to read; None reads those of the installed distributions.
    """
    return _load(EXPORTERS, Exporter, entries)[0]  # type: ignore[type-abstract]


def runtimes(entries: Iterable[EntryPoint] | None = None) -> dict[str, Runtime]:
    """Installed runtimes by name; left out are those that :func:`exporters` would leave out."""
    return _load(RUNTIMES, Runtime, entries)[0]  # type: ignore[type-abstract]


def runtimes_for(path: Path) -> dict[str, Runtime]:
    """Installed runtimes but those that files of such a name are not written for.

    A runtime whose exporters write ``.onnx`` alone is not asked to open OpenVINO IR, and one that
    none writes for is asked to open anything.
    """
    writers = [e for e in exporters().values() if isinstance(e, FormalExporter)]
    fit = {e.runtime for e in writers if path.suffix in e.suffixes}
    others = {e.runtime for e in writers} - fit if fit else set()
    return {name: runtime for name, runtime in runtimes().items() if name not in others}


def get_exporter(name: str) -> Exporter:
    """The exporter of that name.

    Raises:
        SpecError: if none is installed, listing those that are.
        UnavailableError: if it lacks a package, saying which.
    """
    return _pick("target", name, EXPORTERS, Exporter)  # type: ignore[type-abstract]


def get_runtime(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        SpecError: if none is installed, listing those that are.
        UnavailableError: if it lacks a package, saying which.
    """
    return _pick("runtime", name, RUNTIMES, Runtime)  # type: ignore[type-abstract]


Missing: TypeAlias = dict[str, UnavailableError]


def _pick(kind: str, name: str, group: str, protocol: type[Plugin]) -> Plugin:
    """One plugin; the others are loaded only to list them where there is none of the name."""
    entries = [entry for entry in _installed(group) if entry.name == name]
    found, missing = _load(group, protocol, entries)
    if name in missing:
        raise UnavailableError(f"{kind} {name!r}: {missing[name]}")
    if name not in found:
        there, _ = _load(group, protocol, [e for e in _installed(group) if e.name != name])
        raise SpecError(unknown_name(kind, name, sorted(there)))
    return found[name]


def _load(
    group: str, protocol: type[Plugin], entries: Iterable[EntryPoint] | None
) -> tuple[dict[str, Plugin], Missing]:
    """Plugins that work, and why those that lack a package do not."""
    found: dict[str, Plugin] = {}
    missing: Missing = {}
    for entry in _installed(group) if entries is None else entries:
        try:
            plugin = _load_one(entry, protocol)
        except UnavailableError as error:
            missing[entry.name] = error
            continue
        if plugin is None:
            continue
        if entry.name in found:
            raise SpecError(
                f"two installed distributions provide {entry.name!r} in {group}; uninstall one"
            )
        found[entry.name] = plugin
    return found, missing


def _installed(group: str) -> tuple[EntryPoint, ...]:
    """What distributions announce, read again only after one was installed, removed or moved.

    Reading opens a file of every distribution there is, and an export asks a dozen times.
    """
    return _announced(group, tuple((place, _changed(place)) for place in sys.path))


@lru_cache(maxsize=8)
def _announced(group: str, places: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def _changed(place: str) -> int:
    """When a folder of distributions last gained or lost one; 0 where there is none."""
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0


def _load_one(entry: EntryPoint, protocol: type[Plugin]) -> Plugin | None:
    """Import and build one plugin. Whatever a stranger's code raises must not stop the others."""
    try:
        plugin = entry.load()()
        wrong = _misfit(plugin, entry.name, protocol)
    except UnavailableError:
        raise
    except (Exception, SystemExit) as error:
        warnings.warn(
            f"plugin {entry.name!r} ({entry.value}) failed to load: {error}", stacklevel=4
        )
        return None
    if wrong:
        warnings.warn(f"plugin {entry.name!r} ({entry.value}) {wrong}", stacklevel=4)
        return None
    return plugin


def _misfit(plugin: Any, name: str, protocol: type[Plugin]) -> str | None:
    """What keeps something from being the plugin of a name."""
    lacking = [member for member in _members(protocol) if not hasattr(plugin, member)]
    if lacking:
        return f"lacks what the protocol {protocol.__name__} asks for: {', '.join(lacking)}"
    own = plugin.name
    return None if own == name else f"calls itself {own!r}, not as its entry point does"


def _members(protocol: type) -> list[str]:
    """Attributes and methods that a protocol asks for."""
    parts = {*vars(protocol), *getattr(protocol, "__annotations__", ())}
    return sorted(part for part in parts if not part.startswith("_"))

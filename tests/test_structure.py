"""The architecture's rules, held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import sqakd_exporters

import sqakd_deploy

CORE, EXPORTERS = (Path(package.__file__).parent for package in (sqakd_deploy, sqakd_exporters))
IN_CORE = sorted(CORE.rglob("*.py"))
SOURCES = [*IN_CORE, *sorted(EXPORTERS.rglob("*.py"))]
TORCH_FREE = (
    "errors",
    "registry",
    "spec",
    "config",
    "graph",
    "exporting",
    "plugins",
    "files",
    "cli",
    "consoles",
    "streams",
    "epilogs",
    "lowering.subpixel",
)
TORCH_FREE += ("abilities", "strict_json")
TORCH_FREE += ("bench.measure", "bench.inputs", "bench.process", "bench.worker", "cpu")
TORCH_FREE += ("bench.command", "catalogue", "listening", "progress")
TORCH_FREE_VERIFICATION = ("command", "reference", "tables", "verifying")
TORCH_FREE_DATA = ("preprocessing", "splits", "options", "digits", "decode", "layout", "load")
TORCH_FREE_EXPORTERS = ("onnxruntime", "openvino", "qonnx", "tensorrt")


def called(path: Path) -> str:
    """A module's full name."""
    package = CORE if path.is_relative_to(CORE) else EXPORTERS
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # if it is a module
    return found


@pytest.mark.parametrize("path", IN_CORE, ids=called)
def test_the_core_imports_no_exporter(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] == "sqakd_exporters"}


def test_what_is_said_to_be_free_of_torch_is() -> None:
    """One process imports them all: what none of them loads, none alone does."""
    names = [
        *(f"sqakd_deploy.{name}" for name in TORCH_FREE),
        *(f"sqakd_deploy.data.{name}" for name in TORCH_FREE_DATA),
        *(f"sqakd_deploy.verification.{name}" for name in TORCH_FREE_VERIFICATION),
        *(f"sqakd_exporters.{name}" for name in TORCH_FREE_EXPORTERS),
    ]
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_import_one_way() -> None:
    """No cycle: every import points to a module that does not lead back."""
    graph = {called(path): imported(path) for path in SOURCES}
    graph.pop("sqakd_deploy")  # the lazy namespace names everything and imports nothing
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' → '.join((*trail, name))}"
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_consoles_are_made_in_one_place() -> None:
    """Any other would take a part of a path for markup."""
    made = {called(path) for path in SOURCES if "Console(" in path.read_text(encoding="utf-8")}
    assert made == {"sqakd_deploy.consoles"}


def test_no_file_outgrows_its_concern() -> None:
    longest = {called(p): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert {name: count for name, count in longest.items() if count > 360} == {}


def test_every_public_name_exists() -> None:
    for name in sqakd_deploy.__all__:
        assert getattr(sqakd_deploy, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sqakd_deploy.nothing  # noqa: B018

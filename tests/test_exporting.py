"""How installed exporters and runtimes are found."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import onnx
import pytest

from sqakd_deploy import plugins
from sqakd_deploy.config import RunConfig
from sqakd_deploy.errors import SpecError, UnavailableError
from sqakd_deploy.exporting import Artifact, ExportOptions, PlacementRules
from sqakd_deploy.graph import IntegerGraph
from sqakd_deploy.plugins import EXPORTERS, RUNTIMES, exporters, get_exporter, get_runtime, runtimes
from sqakd_deploy.spec import QuantSpec
from sqakd_deploy.training.train import train

ROOT = Path(__file__).parents[1]


class Toy:
    """The least that is an exporter."""

    name = "toy"
    summary = "nothing"
    runtime = "onnxruntime"
    placement = PlacementRules(quantize_edges=False)

    def check(self, spec: QuantSpec) -> None:
        pass

    def export(self, graph: IntegerGraph, path: Path, options: ExportOptions) -> Artifact:
        return Artifact(path, self.name, 0)


class Player:
    """The least that is a runtime."""

    name = "player"

    def open(self, path: Path, *, optimize: bool = True, threads: int | None = None) -> None:
        raise NotImplementedError


class Toast(Toy):
    name = "toast"


class Refusing(Toy):
    @property
    def placement(self) -> PlacementRules:  # type: ignore[override]
        raise ImportError("a library is missing")


class Incomplete:
    name = "incomplete"


def fails() -> None:
    raise RuntimeError("no licence found")


def lacks() -> None:
    raise UnavailableError("the package toys is not installed; pip install toys")


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy_plugins")
    for part in (Toy, Toast, Refusing, Player, Incomplete, fails, lacks):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "toy_plugins", module)


def entry(attribute: str, name: str = "toy", group: str = EXPORTERS) -> EntryPoint:
    return EntryPoint(name, f"toy_plugins:{attribute}", group)


def test_those_that_come_with_the_package_are_installed() -> None:
    assert exporters()["onnxruntime"].runtime == "onnxruntime"
    assert runtimes()["onnxruntime"].name == "onnxruntime"
    assert get_exporter("onnxruntime").placement == PlacementRules()
    assert get_runtime("onnxruntime").name == "onnxruntime"


def test_an_entry_point_is_found_and_built() -> None:
    found = exporters([entry("Toy")])
    assert list(found) == ["toy"]
    assert isinstance(found["toy"], Toy)
    assert list(runtimes([entry("Player", "player", RUNTIMES)])) == ["player"]


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (entry("fails", "bad"), r"plugin 'bad' \(toy_plugins:fails\) .*: no licence found"),
        (entry("Nothing", "bad"), r"plugin 'bad' .* failed to load: .*Nothing"),
        (EntryPoint("bad", "no_such_module_here:Toy", EXPORTERS), "No module named"),
        (EntryPoint("bad", "toy_plugins", EXPORTERS), "plugin 'bad' .* failed to load"),
        (
            entry("Incomplete", "bad"),
            r"lacks what the protocol Exporter asks for: check, expor",
        ),
        (entry("Player", "bad"), r"plugin 'bad' .* lacks what .*: check, export, placement, run"),
        (entry("Refusing", "toy2"), r"plugin 'toy2' .* failed to load: a library is missing"),
        (entry("Toy", "bad"), r"plugin 'bad' .* calls itself 'toy', not as its entry point does"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_broken_one_warns_and_harms_nothing(broken: EntryPoint, text: str, first: bool) -> None:
    entries = [broken, entry("Toy")] if first else [entry("Toy"), broken]
    with pytest.warns(UserWarning, match=text) as caught:
        found = exporters(entries)
    assert list(found) == ["toy"]
    assert len(caught) == 1


def test_duplicates_are_an_error() -> None:
    with pytest.raises(SpecError, match="two installed distributions provide 'toy'"):
        exporters([entry("Toy"), entry("Toy")])


def test_one_that_lacks_a_package_is_left_out_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Warnings are errors here; whoever asks for it by name is told what to install."""
    both = [entry("lacks", "absent"), entry("Toy")]
    assert list(exporters(both)) == ["toy"]
    monkeypatch.setattr(plugins, "_installed", lambda group: both)
    with pytest.raises(UnavailableError, match=r"target 'absent': .*pip install toys"):
        get_exporter("absent")


def test_only_the_one_that_is_asked_for_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may import for seconds, or be broken, of which a warning would be an error here."""
    both = [entry("fails", "bad"), entry("Toy")]
    monkeypatch.setattr(plugins, "_installed", lambda group: both)
    assert isinstance(get_exporter("toy"), Toy)


def test_a_broken_twin_does_not_count() -> None:
    with pytest.warns(UserWarning, match="no licence found"):
        assert list(exporters([entry("fails"), entry("Toy")])) == ["toy"]


def test_an_unknown_name_lists_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        EXPORTERS: [entry("Toy"), entry("Toast", "toast")],
        RUNTIMES: [entry("Player", "player", RUNTIMES)],
    }
    monkeypatch.setattr(plugins, "_installed", lambda group: installed[group])
    with pytest.raises(
        SpecError, match=r"unknown target 'toys'\. Did you mean 'toy'\? There are: toast, toy\."
    ):
        get_exporter("toys")
    with pytest.raises(SpecError, match=r"unknown runtime 'x'\. There are: player\."):
        get_runtime("x")
    assert isinstance(get_exporter("toast"), Toy)


def test_with_nothing_installed_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_installed", lambda group: [])
    with pytest.raises(SpecError, match=r"unknown target 'toy'\. There are: none\."):
        get_exporter("toy")


# -- a distribution of its own ------------------------------------------------------------------


def example() -> dict[str, str]:
    """The files of the example in ``exporters/README.md``, by name."""
    text = (ROOT / "exporters" / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"```(?:toml|python)\n# (\S+)\n(.*?)```", text, flags=re.DOTALL))


def install(folder: Path) -> None:
    """What ``pip install .`` would leave of the example in ``folder``."""
    files = example()
    (folder / "sqakd_reference.py").write_text(files["sqakd_reference.py"], encoding="utf-8")
    project = configparser.ConfigParser()
    project.read_string(files["pyproject.toml"])
    info = folder / "sqakd_reference-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sqakd-reference\nVersion: 1.0\n")
    lines = []
    for group in (EXPORTERS, RUNTIMES):
        lines.append(f"[{group}]")
        section = project[f'project.entry-points."{group}"']
        lines += [f"{name} = {value.strip(chr(34))}" for name, value in section.items()]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    search = os.pathsep.join(str(path) for path in (*paths, ROOT / "tests"))
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_example_of_the_readme_is_found_and_used(tmp_path: Path) -> None:
    """A third party's distribution, told from nothing but what the README says."""
    install(tmp_path)
    target = tmp_path / "model.onnx"
    done = run(
        f"""
        from pathlib import Path
        import numpy as np
        from integer_graphs import CASES, images
        from reference_executor import logits
        from sqakd_deploy.errors import SpecError
        from sqakd_deploy.exporting import ExportOptions
        from sqakd_deploy.plugins import exporters, get_exporter, get_runtime
        from sqakd_deploy.spec import QuantSpec, TensorSpec

        assert {{"onnxruntime", "reference"}} <= set(exporters())
        exporter = get_exporter("reference")
        exporter.check(QuantSpec())
        eight = TensorSpec(bits=8)
        try:
            exporter.check(QuantSpec(weights=eight, activations=eight))
        except SpecError as error:
            assert "wanted fewer than 8 bits" in str(error)
        graph = CASES["plain"]().graph
        artifact = exporter.export(graph, Path({str(target)!r}), ExportOptions())
        session = get_runtime(exporter.runtime).open(artifact.path)
        step = graph.values[graph.output].grid.scale
        error = np.abs(session.run(images(4)) - logits(graph, images(4))).max() / step
        print(round(float(error), 3), dict(session.coverage().total))
        """,
        tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.split(" ", 1)[0] == "0.0"
    assert "'Conv': 3" in done.stdout
    assert target.exists()


def test_what_is_installed_or_removed_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sqakd_reference", raising=False)
    before = set(exporters())
    assert "reference" not in before
    install(tmp_path)
    assert set(exporters()) == before | {"reference"}
    shutil.rmtree(tmp_path / "sqakd_reference-1.0.dist-info")
    assert set(exporters()) == before
    monkeypatch.delitem(sys.modules, "sqakd_reference")


def test_a_broken_distribution_harms_no_other(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "sqakd_reference.py").write_text("raise ImportError('half installed')\n")
    done = run(
        """
        import warnings
        from sqakd_deploy.plugins import exporters

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(sorted(exporters()))
        print(*(str(warning.message) for warning in caught))
        """,
        tmp_path,
    )
    assert "onnxruntime" in done.stdout.splitlines()[0]
    assert "reference" not in done.stdout.splitlines()[0]
    assert "plugin 'reference'" in done.stdout
    assert "half installed" in done.stdout


def install_broken(folder: Path) -> None:
    """A third distribution, whose module cannot be imported."""
    (folder / "sqakd_broken.py").write_text("raise ImportError('half installed')\n")
    info = folder / "sqakd_broken-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sqakd-broken\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[{EXPORTERS}]\nbroken = sqakd_broken:Exporter\n")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A working plugin and a broken one, each in a folder of its own, as a process finds them."""
    folders = [tmp_path / "third_party", tmp_path / "broken"]
    for folder, put in zip(folders, (install, install_broken), strict=True):
        folder.mkdir()
        put(folder)
    search = os.pathsep.join(str(path) for path in (*folders, ROOT / "tests"))
    return {**os.environ, "PYTHONPATH": search}


USED = """
import sys
from networks import SHAPE, images, network
from sqakd_deploy import QuantSpec, calibrate, export, quantize, verify
from sqakd_deploy.errors import SpecError, UnavailableError

model = network("mixed")
student = quantize(model, QuantSpec(target="reference"), example=SHAPE)
calibrate(student, images(64))
artifact = export(student, sys.argv[1])
report = verify(artifact, student, images(16, seed=5))
print(artifact.exporter, [stage.name for stage in report.stages[1:]])
print({stage.agreement for stage in report.stages}, report.coverage.fallbacks[0].reason)
try:
    quantize(model, QuantSpec.parse({
        "weights": {"bits": 8}, "activations": {"bits": 8}, "target": "reference"
    }), example=SHAPE)
except SpecError as error:
    print(error)
"""


def test_a_third_party_is_used_from_quantize_to_verify(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    target = tmp_path / "model.onnx"
    done = subprocess.run(
        [sys.executable, "-c", USED, str(target)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "reference ['reference, optimisations off', 'reference, optimisations on']",
        "{100.0} the evaluator fuses nothing",
        "target 'reference': wanted fewer than 8 bits on one side",
    ]
    assert "broken" not in done.stderr  # nobody asked for it
    assert onnx.load(target).opset_import[0].version == 19  # the first that the example allows


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_lists_a_third_party(as_json: bool, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sqakd_deploy", "list", "targets", *["--json"] * as_json],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout
    assert "QDQ ONNX for onnx's reference evaluator" in done.stdout
    assert "broken" not in done.stdout
    assert "plugin 'broken' (sqakd_broken:Exporter) failed to load: half installed" in done.stderr
    if as_json:
        json.loads(done.stdout)


def test_a_target_without_a_proof_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Export would need its runtime, after hours."""
    monkeypatch.setattr(Toast, "runtime", "oven", raising=False)
    installed = {EXPORTERS: [entry("Toast", "toast")], RUNTIMES: [entry("Player", "player")]}
    monkeypatch.setattr(plugins, "_installed", lambda group: installed[group])
    config = RunConfig.model_validate({"quantization": {"target": "toast"}})
    with pytest.raises(SpecError, match="target 'toast' has no proof here: unknown runtime 'oven'"):
        train(config, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""The README's promises, run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_are_on_top() -> None:
    first, second, third = blocks("bash")[:3]
    assert first.strip() == "pip install . && sqakd-deploy train --bits 4"
    assert second.strip() == "pip install '.[test]' && pytest"
    assert third.strip() == "sqakd-deploy export model.onnx"


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^pip install .*&& pytest(?= \|\| exit 1$)", script, flags=re.MULTILINE
    )
    assert command.replace("--quiet ", "") == blocks("bash")[1].strip()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_examples_run(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = blocks("python")[number]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    shown = capsys.readouterr().out
    for printed in re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE):
        assert printed in shown


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

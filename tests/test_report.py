"""What is drawn of a long job."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sqakd_deploy.catalogue import listing
from sqakd_deploy.consoles import console
from sqakd_deploy.progress import PlainListener, RichListener, listener_for
from sqakd_deploy.report import score_table, train_table
from sqakd_deploy.results import TrainResult
from sqakd_deploy.scoring import Score
from sqakd_deploy.strict_json import strict
from sqakd_deploy.training.fitting import Step

ODD = "runs/p[/q] [a] [bold]b :cat:"
"""A path with what a console could take for markup, and for the name of a picture."""


class Clock:
    """A second a call, or as many as set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("sqakd_deploy.progress.time.monotonic", made)
    return made


def step(number: int) -> Step:
    return Step(number // 10, number % 10, 10, 10, 1.5, 80.0, 1e-3, 250.0)


def plain() -> tuple[PlainListener, StringIO]:
    text = StringIO()
    listener = listener_for(Console(file=text, width=200))
    assert isinstance(listener, PlainListener)
    return listener, text


def test_plain_lines_tell_the_time_left(clock: Clock) -> None:
    listener, text = plain()
    listener.start("student", 100)
    for number in range(20):
        clock.now += 0.5
        listener.advance(number + 1, step(number))
    listener.finish()
    last = text.getvalue().splitlines()[-1]
    assert last.startswith("student 20/100, 10 s, eta 40 s, epoch 2/10  loss 1.5000")
    assert "agreement 80.0 %  250 img/s  lr 1.0e-03" in last


def test_a_last_line_is_said_once(clock: Clock) -> None:
    """A person may have read it already."""
    listener, text = plain()
    for task in ("student", "student"):
        listener.start(task, 10)
        for number in range(10):
            clock.now += 1.0
            listener.advance(number + 1, step(number))
        listener.finish()
        listener.finish()
    assert text.getvalue().count("student 10/10") == 2
    assert len(text.getvalue().splitlines()) == 4


def test_what_a_resumed_run_had_done_before_is_no_speed(clock: Clock) -> None:
    listener, text = plain()
    listener.start("student", 100)
    for number in range(50, 60):
        clock.now += 1.0
        listener.advance(number + 1, step(number))
    listener.finish()
    assert text.getvalue().splitlines()[-1].startswith("student 60/100, 10 s, eta 40 s")


def test_a_bar_forgets_it_too(clock: Clock) -> None:
    listener = RichListener(Console(file=StringIO(), force_terminal=True))
    listener.start("student", 100)
    progress = listener._progress
    assert progress is not None
    progress.get_time = clock  # type: ignore[method-assign]
    for number in range(50, 60):
        clock.now += 1.0
        listener.advance(number + 1, step(number))
    (task,) = progress.tasks
    assert task.completed == 60
    assert task.speed == pytest.approx(1.0)
    assert task.time_remaining == 40
    listener.finish()


def test_tasks_without_steps_start_at_nothing(clock: Clock) -> None:
    listener, text = plain()
    listener.start("decoding", 100)
    clock.now += 6.0
    listener.advance(60)
    listener.finish()
    assert text.getvalue().splitlines() == ["decoding 60/100, 6 s, eta 4 s"]


def test_compiling_in_the_first_step_tells_no_speed(clock: Clock) -> None:
    listener, text = plain()
    listener.start("student", 100)
    clock.now += 90.0
    for number in range(20):
        listener.advance(number + 1, step(number))
        clock.now += 0.5
    listener.finish()
    first, *_, last = text.getvalue().splitlines()
    assert first.startswith("student 1/100, 90 s, epoch 1/10")
    assert last.startswith("student 20/100, 100 s, eta 40 s")


@pytest.mark.parametrize("terminal", [False, True])
def test_messages_say_paths_as_they_are(terminal: bool) -> None:
    text = StringIO()
    listener = listener_for(Console(file=text, width=200, force_terminal=terminal))
    listener.message(f"wrote {ODD}")
    assert text.getvalue() == f"wrote {ODD}\n"


def test_consoles_print_paths_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """In lines, in tables and in their titles."""
    counts = {"weights": {4: 1}, "activations": {4: 1}}
    facts = (10, False, {}, "w4a4 lsq", 5, None, None, 100.0, 0.0, counts, 4, 2, 1)
    result = TrainResult(Path(ODD), *facts)
    score = Score(ODD, 1, 1.0, None, 1.0)
    shown = [ODD, train_table(result), score_table([score]), *listing({ODD: {"a": ODD}})]
    for thing, times in zip(shown, (1, 1, 1, 2), strict=True):
        console().print(thing)
        assert capsys.readouterr().out.count(ODD) == times
    console(stderr=True).print(ODD)
    assert capsys.readouterr().err == f"{ODD}\n"


def test_json_for_other_programs_has_no_words_for_numbers() -> None:
    text = strict({"loss": float("nan"), "by": [float("inf"), 1.5, ("a", None)]}, indent=2)
    assert json.loads(text) == {"loss": None, "by": [None, 1.5, ["a", None]]}

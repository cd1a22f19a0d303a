"""What is drawn of a long job."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from sqakd_deploy.fitting import Step
from sqakd_deploy.report import PlainListener, RichListener, listener_for


class Clock:
    """A second a call, or as many as set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("sqakd_deploy.report.time.monotonic", made)
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
    assert text.getvalue().splitlines() == ["decoding 60/100, 6 s, eta 4 s"] * 2


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

"""Stages say what is running and how far it is, and are mentioned when they are slow."""

import logging
import threading

import pytest

from fedra_engine.runtime import stages
from fedra_engine.runtime.stages import SlowStages, Stage, running_stage


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stages, "monotonic", lambda: self.now)

    def mentions(self, slow: SlowStages, seconds: int) -> list[float]:
        """When `slow` is due in the next seconds, counted from the first."""
        began, found = self.now, []
        for half in range(2 * seconds + 1):
            self.now = began + half / 2
            if slow.due() is not None:
                found.append(half / 2)
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_innermost_stage_is_the_running_one() -> None:
    assert running_stage() is None
    with Stage("decoding images", 2_780) as outer:
        outer.advance(1_000)
        outer.advance(16)
        assert str(running_stage()) == "decoding images … 1,016 of 2,780"
        with Stage("loading the model") as inner:
            assert running_stage() is inner
            assert str(inner) == "loading the model … 0 s"
        assert running_stage() is outer
    assert running_stage() is None


def test_no_two_mentions_of_a_stage_without_steps_are_the_same(clock: Clock) -> None:
    slow, lines = SlowStages(), list[str]()
    with Stage("reading the data"):
        for _ in range(20):
            clock.now += 0.5
            if (stage := slow.due()) is not None:
                lines.append(str(stage))
    assert lines == ["reading the data … 2 s", "reading the data … 6 s"]


def test_a_stage_starts_no_thread_and_is_over_when_it_fails() -> None:
    before = threading.active_count()

    def fail() -> None:
        with Stage("failing"):
            assert threading.active_count() == before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert running_stage() is None


def test_a_stage_that_is_over_tells_its_time_to_who_debugs(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fedra_engine"), Stage("loading the model"):
        clock.now += 1.5
    assert caplog.messages == ["loading the model took 1.50 s"]


def test_a_long_stage_is_mentioned_after_pauses_that_double_up_to_five_minutes(clock: Clock) -> None:
    with Stage("decoding images"):
        assert clock.mentions(SlowStages(), 1400) == [2, 6, 14, 30, 62, 126, 254, 510, 810, 1110]


def test_what_comes_again_is_mentioned_when_it_takes_twice_as_long_as_ever_before(clock: Clock) -> None:
    slow, mentioned = SlowStages(), []
    for seconds in (10, 10, 4, 19, 30, 59):
        with Stage("local steps"):
            mentioned.append(clock.mentions(slow, seconds))
        slow.due()
    assert mentioned == [[2, 6], [], [], [], [], []]
    with Stage("local steps"):
        assert clock.mentions(slow, 130) == [118]
    with Stage("evaluating"):
        assert clock.mentions(slow, 3) == [2]


def test_a_round_of_hours_is_mentioned_every_five_minutes(clock: Clock) -> None:
    slow = SlowStages()
    with Stage("local steps"):
        clock.mentions(slow, 4000)
    with Stage("local steps"):
        assert clock.mentions(slow, 1000) == [300, 600, 900]

"""Speed, loss and remaining time of a run."""

from fedra_engine.callbacks.meter import Meter
from fedra_engine.federation.records import RoundMetrics
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage


def metrics(round: int, loss: float | None = 1.75) -> RoundMetrics:
    return RoundMetrics(round, participants=4, samples=3000, loss=loss, lr=0.1, blocks_held=2, seconds=2.0)


def test_speed_and_remaining_time_are_those_of_this_process() -> None:
    now = 0.0
    meter = Meter(clock=lambda: now)
    meter.round_started(10, rounds=13)
    assert "ETA -:--:--" in meter.status_text()
    now = 2.0
    meter.trained(4, samples=3000, loss=lambda: 0.75)
    meter.round_finished(metrics(10, 0.5))
    assert meter.round_text() == "11/13"
    assert meter.status_text() == "loss 0.5000  4 clients  1,500 samples/s  ETA 0:00:04"


def test_local_steps_of_the_first_round_already_tell_the_time_left() -> None:
    now = 0.0
    meter = Meter(clock=lambda: now)
    meter.round_started(0, rounds=3)
    now = 10.0
    stage = Stage(LOCAL_STEPS, 20)
    stage.advance(5)
    assert meter.part_of_round(stage) == 0.25
    assert meter.time_left(0.25) == "0:01:50"
    # What comes after the local steps has no part of its own, and the next round begins anew.
    assert meter.part_of_round(Stage("evaluating", 8)) == meter.part_of_round(None) == 0.25
    meter.round_finished(metrics(0))
    meter.round_started(1, rounds=3)
    assert meter.part_of_round(None) == 0.0


def test_the_loss_is_read_once_a_second_and_at_the_end_of_the_round() -> None:
    now, reads = 0.0, 0

    def loss() -> float:
        nonlocal reads
        reads += 1
        return 4.0 - now

    meter = Meter(clock=lambda: now)
    meter.round_started(0, rounds=1)
    for tenth in range(21):
        now = tenth / 10
        meter.trained(tenth, samples=tenth, loss=loss)
    assert reads == 3
    assert "loss 2.000" in meter.status_text()
    meter.round_finished(metrics(0, loss=1.5))
    assert "loss 1.500" in meter.status_text()


def test_within_a_round_the_speed_of_the_last_one_and_at_first_the_expected_number_stand() -> None:
    now = 0.0
    meter = Meter(clock=lambda: now)
    meter.expected = 6
    meter.round_started(0, rounds=2)
    meter.round_finished(metrics(0))
    meter.round_started(1, rounds=2)
    assert (meter.speed_text(), meter.participants, meter.clients) == ("1,500 samples/s", 6, 0)
    now = 2.0
    meter.trained(1, samples=10, loss=lambda: None)
    assert (meter.speed_text(), meter.clients) == ("1,500 samples/s", 1)


def test_what_earlier_processes_measured_is_remembered() -> None:
    meter = Meter()
    records = [{"loss": 2.0}, {"loss": None, "accuracy": {"a": 0.5}}, {"loss": 1.0}]
    meter.remember([{"round": round, **record} for round, record in enumerate(records)])
    meter.round_started(3, rounds=9)
    meter.round_finished(metrics(3, loss=None))
    meter.round_started(4, rounds=9)
    meter.round_finished(metrics(4, loss=0.5))
    assert meter.losses == [2.0, 1.0, 0.5]
    assert meter.evaluations == [{"a": 0.5}]
    assert meter.round_text() == "5/9"

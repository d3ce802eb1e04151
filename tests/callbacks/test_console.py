"""A run says what it does: in lines, in a live display or only in the log."""

import io
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedra_engine.callback import Evaluation, Outcome, Round, Update
from fedra_engine.callbacks.console import Console, Meter
from fedra_engine.config import ExperimentConfig
from fedra_engine.federation.records import RoundMetrics, Tally
from fedra_engine.runtime.tables import PlainConsole

EXPERIMENT: Any = SimpleNamespace(
    config=ExperimentConfig(rounds=2),
    method=SimpleNamespace(caution=None),
    train_data=SimpleNamespace(notes=["a [small] model"]),
)


def metrics(round: int, loss: float = 1.75) -> RoundMetrics:
    return RoundMetrics(round, participants=3, samples=30, loss=loss, lr=0.1, blocks_held=2, seconds=2.0)


def update(round: int, clients: int, samples: int, participants: int = 3) -> Update:
    tally = Tally(clients, samples, torch.tensor(2.0 * samples))
    nothing: Any = None
    return Update(round, participants, tally, nothing, nothing, nothing)


def show_rounds(console: Console, rounds: int, accuracy: dict[str, float]) -> None:
    """As a run of `rounds` rounds tells it, which is evaluated at the end."""
    state: Any = None
    console.on_evaluate(EXPERIMENT, state, Evaluation(accuracy))
    for round in range(rounds):
        console.on_update(EXPERIMENT, update(round, 2, 20))
        console.on_update(EXPERIMENT, update(round, 3, 30))
        if round + 1 == rounds:
            console.on_evaluate(EXPERIMENT, state, Evaluation(accuracy, metrics(round)))
        console.on_round(EXPERIMENT, state, Round(metrics(round), state, state, state))
    frozen = dict.fromkeys(accuracy, 0.25)
    console.on_end(EXPERIMENT, state, Outcome(rounds, frozen, accuracy, accuracy))


def run_two_rounds(log: Path, terminal: bool) -> str:
    output = io.StringIO()
    state: Any = None
    with (
        pytest.MonkeyPatch.context() as patch,
        Console(log, PlainConsole(file=output, force_terminal=terminal, width=100)) as console,
    ):
        patch.setattr("fedra_engine.callbacks.console.describe", lambda _: {"model": "a model"})
        console.on_start(EXPERIMENT, state, 0)
        show_rounds(console, 2, {"clean": 0.5, "noisy": 0.25})
    return output.getvalue()


def test_plain_output_has_a_line_a_round_and_no_control_characters(tmp_path: Path) -> None:
    text = run_two_rounds(tmp_path / "run.log", terminal=False)
    assert not {"\x1b", "\r"} & set(text)
    assert "a [small] model" in text
    rounds = [line for line in text.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    assert all("loss 1.7500  3 clients" in line for line in rounds)
    assert "accuracy after round 2: 37.5  (clean 50.0  noisy 25.0)" in text
    assert "".join(text.splitlines()[-1].split()) == "tuned50.025.037.5"


def test_a_terminal_gets_bars_instead_of_lines(tmp_path: Path) -> None:
    text = run_two_rounds(tmp_path / "run.log", terminal=True)
    assert "\x1b[" in text
    assert "━" in text
    assert not any(line.startswith("round ") for line in text.splitlines())
    assert "37.5" in text


def test_other_measures_are_averages_over_the_domains(tmp_path: Path) -> None:
    before, after = ({"accuracy": {"a": 0.5}, "test_loss": {"a": loss, "b": 1.0}} for loss in (3.0, 2.0))
    output, share = io.StringIO(), {"a": 0.5}
    state: Any = None
    with Console(tmp_path / "run.log", PlainConsole(file=output)) as console:
        console.on_evaluate(EXPERIMENT, state, Evaluation({"a": 0.5}, metrics(0), after))
        console.on_end(EXPERIMENT, state, Outcome(1, share, share, share, None, None, before, after))
    for text in (output.getvalue(), (tmp_path / "run.log").read_text()):
        assert "on average: test_loss 1.5\n" in text
        assert "on average: test_loss 2 → 1.5\n" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_everything_is_in_the_log(tmp_path: Path, terminal: bool) -> None:
    run_two_rounds(tmp_path / "run.log", terminal)
    log = (tmp_path / "run.log").read_text()
    assert "\x1b" not in log
    for text in ("a [small] model", "round 1/2", "round 2/2", "after round 2", "frozen: 25.0", "tuned: 37.5"):
        assert text in log


@pytest.mark.parametrize("domain", ["[/red]", ":smile:", "[bold]x[/bold]"])
def test_domains_are_no_markup(tmp_path: Path, domain: str) -> None:
    output = io.StringIO()
    with Console(tmp_path / "run.log", PlainConsole(file=output)) as console:
        show_rounds(console, 1, {domain: 0.5})
    assert f"({domain} 50.0)" in output.getvalue()
    assert f"accuracy (%)  {domain}  average" in output.getvalue()
    assert f"tuned: 50.0  ({domain} 50.0)" in (tmp_path / "run.log").read_text()


def test_no_name_puts_control_characters_into_the_log(tmp_path: Path) -> None:
    with Console(tmp_path / "run.log", PlainConsole(file=io.StringIO())) as console:
        show_rounds(console, 1, {"a\x1b[2J\udcff\nb": 0.5})
        logging.getLogger("fedra_engine.data").warning("in %s", "c\x1b[2J")
    log = (tmp_path / "run.log").read_text()
    assert "(a\\x1b[2J\\udcff\\nb 50.0)" in log
    assert "in c\\x1b[2J\n" in log


def test_a_table_wider_than_the_output_is_not_cut(tmp_path: Path) -> None:
    output = io.StringIO()
    accuracy = {f"domain {number}": 0.5 for number in range(20)}
    with Console(None, PlainConsole(file=output, width=40)) as console:
        show_rounds(console, 1, accuracy)
    assert output.getvalue().splitlines()[-1].split() == ["tuned", *["50.0"] * 21]


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    for _ in range(2):
        run_two_rounds(tmp_path / "run.log", terminal=False)
    assert (tmp_path / "run.log").read_text().count("tuned: 37.5") == 2


def test_the_log_tells_what_stopped_a_run(tmp_path: Path) -> None:
    def fail() -> None:
        with Console(tmp_path / "run.log", PlainConsole(file=io.StringIO())):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        fail()
    assert "stopped: RuntimeError: out of memory" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize("configured", [False, True])
def test_warnings_are_in_the_log_and_once_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    """Whether or not the program that uses the engine has configured logging."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)] * configured)
    engine = logging.getLogger("fedra_engine.execution.sweep")
    with Console(tmp_path / "run.log", PlainConsole(file=io.StringIO())):
        engine.warning("out of memory with %d lanes", 4)
    assert capsys.readouterr().err == "out of memory with 4 lanes\n"
    engine.warning("after the run")
    log = (tmp_path / "run.log").read_text()
    assert log.endswith("  out of memory with 4 lanes\n")


def test_speed_and_remaining_time_are_those_of_this_process() -> None:
    now = 0.0
    meter = Meter(clock=lambda: now)
    meter.round_started(10, rounds=13)
    assert "ETA -:--:--" in meter.status_text()
    now = 2.0
    meter.trained(4, samples=3000, loss=lambda: 0.75)
    meter.round_finished(RoundMetrics(10, 4, 3000, 0.5, lr=0.1, blocks_held=2, seconds=2.0))
    assert meter.round_text() == "11/13"
    assert meter.status_text() == "loss 0.5000  4 clients  1,500 samples/s  ETA 0:00:04"


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
    assert "loss 2.0000" in meter.status_text()
    meter.round_finished(metrics(0, loss=1.5))
    assert "loss 1.5000" in meter.status_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_reporting_a_batch_of_clients_takes_microseconds(tmp_path: Path, terminal: bool) -> None:
    state: Any = None
    some = update(0, 1, 32, participants=2000)
    with Console(tmp_path / "run.log", PlainConsole(file=io.StringIO(), force_terminal=terminal)) as console:
        console.on_evaluate(EXPERIMENT, state, Evaluation({"clean": 0.5}))
        started = time.process_time()
        for _ in range(2000):
            console.on_update(EXPERIMENT, some)
        seconds = time.process_time() - started
    assert seconds / 2000 < 100e-6

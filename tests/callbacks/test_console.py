"""A run says what it does: in lines, in a live display or only in the log."""

import errno
import io
import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine import build
from fedra_engine.callback import Evaluation, Outcome, Round, Update
from fedra_engine.callbacks import console as console_module
from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.description import describe
from fedra_engine.config import EarlyStoppingConfig, ExperimentConfig
from fedra_engine.federation.records import RoundMetrics, Tally
from fedra_engine.runtime import exit_codes, stages
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import Interrupted
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage
from fedra_engine.runtime.tables import PlainConsole
from tests.running import small_config

EXPERIMENT: Any = SimpleNamespace(
    config=ExperimentConfig(rounds=2),
    method=SimpleNamespace(caution=None),
    newly_cached=None,
    choices={},
    train_data=SimpleNamespace(notes=["a [small] model"]),
    executor=SimpleNamespace(lanes=4),
    processes=SimpleNamespace(count=1),
    initial_state=SimpleNamespace(heads=torch.zeros(1)),
    clients=SimpleNamespace(domains=np.arange(3)),
)
WRITTEN = {"run folder": Path("runs/a"), "log": Path("runs/a/run.log")}


def metrics(round: int, loss: float = 1.75) -> RoundMetrics:
    return RoundMetrics(round, participants=3, samples=30, loss=loss, lr=0.1, blocks_held=2, seconds=2.0)


def update(round: int, clients: int, samples: int, participants: int = 3) -> Update:
    tally = Tally(clients, samples, torch.tensor(2.0 * samples))
    nothing: Any = None
    return Update(round, participants, tally, nothing, nothing, nothing)


def show_rounds(console: Console, rounds: int, accuracy: dict[str, float], first: int = 0) -> None:
    """As a run tells it that goes on after `first` rounds and ends after `rounds`, when it is evaluated."""
    state: Any = None
    console.on_evaluate(EXPERIMENT, state, Evaluation(accuracy))
    for round in range(first, rounds):
        console.on_update(EXPERIMENT, update(round, 2, 20))
        console.on_update(EXPERIMENT, update(round, 3, 30))
        if round + 1 == rounds:
            console.on_evaluate(EXPERIMENT, state, Evaluation(accuracy, metrics(round)))
        console.on_round(EXPERIMENT, state, Round(metrics(round), state, state, state))
    frozen = dict.fromkeys(accuracy, 0.25)
    console.on_end(EXPERIMENT, state, Outcome(rounds, frozen, accuracy, accuracy))
    console.finish(WRITTEN)


def run_two_rounds(log: Path, terminal: bool, first: int = 0, **options: Any) -> str:
    """What is on the screen when the second round is over; of a run that goes on after the `first`."""
    output = io.StringIO()
    state: Any = None
    screen = PlainConsole(file=output, force_terminal=terminal, width=100, height=30)
    with (
        pytest.MonkeyPatch.context() as patch,
        Console(log, screen, config=EXPERIMENT.config, **options) as console,
    ):
        patch.setattr("fedra_engine.callbacks.console.describe", lambda _: {"model": "a model", "lanes": "4"})
        console.on_start(EXPERIMENT, state, first)
        show_rounds(console, 2, {"clean": 0.5, "noisy": 0.25}, first)
    return output.getvalue()


def test_blocks_without_adapters_are_not_counted(tmp_path: Path) -> None:
    few: dict[str, Any] = {"domains": ["clean"], "clients_per_domain": 1}
    clients = {"capacities": [12]}
    experiment = build(small_config(tmp_path, data=few, clients=clients, lora={"layers_to_transform": [2, 5]}))
    assert describe(experiment)["adapters"].startswith("7,168 LoRA parameters in each of 2 blocks, on ")


@pytest.mark.parametrize(("fraction", "text"), [(0.0, "280 training, 120 test"), (0.25, "201 training, 79 validation")])
def test_the_samples_that_are_evaluated_are_counted(tmp_path: Path, fraction: float, text: str) -> None:
    data: dict[str, Any] = {"domains": ["clean", "noisy"], "validation_fraction": fraction}
    told = describe(build(small_config(tmp_path, data=data, clients={"capacities": [4]})))["samples"]
    assert told == text


def test_the_header_has_the_samples_as_soon_as_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = None
    monkeypatch.setattr("fedra_engine.callbacks.console.describe", lambda _: {"samples": "9 training, 3 test"})
    screen = PlainConsole(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with Console(None, screen, config=EXPERIMENT.config) as console:
        assert "samples   …" in [row.plain for row in console.view.rows(80, 24)]
        console.on_start(EXPERIMENT, state, 0)
        assert "samples   9 training, 3 test" in [row.plain for row in console.view.rows(80, 24)]


def test_plain_output_has_a_line_a_round_and_no_control_characters(tmp_path: Path) -> None:
    text = run_two_rounds(tmp_path / "run.log", terminal=False)
    assert not {"\x1b", "\r"} & set(text)
    assert "a [small] model" in text
    rounds = [line for line in text.splitlines() if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    assert all("loss 1.750  3 clients" in line for line in rounds)
    assert "accuracy after round 2: 37.5 % (clean 50.0 %, noisy 25.0 %)" in text
    *_, tuned, _, folder, log = text.splitlines()
    assert "".join(tuned.split()) == "tuned50.025.037.5"
    assert (folder, log) == ("run folder  runs/a", "log         runs/a/run.log")


def test_a_terminal_has_a_display_and_at_the_end_header_table_and_paths(tmp_path: Path) -> None:
    text = run_two_rounds(tmp_path / "run.log", terminal=True)
    shown, _, left = text.rpartition("\x1b[?25h")
    assert "rounds" in shown
    assert "a [small] model" in shown
    assert not any(line in text for line in ("round 1/2", "accuracy after", "lanes "))
    for line in (
        "fedra, 2 rounds, seed 0",
        "a model",
        "tuned          50.0   25.0     37.5",
        "log         runs/a/run.log",
    ):
        assert line in left


def test_other_measures_are_averages_over_the_domains(tmp_path: Path) -> None:
    before, after = (
        {"accuracy": {"a": 0.5}, "test_loss": {"a": loss, "b": 1.0}, "macro_f1": {"a": 1 / loss, "b": 0.25}}
        for loss in (3.0, 2.0)
    )
    output, share = io.StringIO(), {"a": 0.5}
    state: Any = None
    with Console(tmp_path / "run.log", PlainConsole(file=output)) as console:
        console.on_evaluate(EXPERIMENT, state, Evaluation({"a": 0.5}, metrics(0), after))
        console.on_end(EXPERIMENT, state, Outcome(1, share, share, share, None, None, before, after))
        console.finish(WRITTEN)
    for text in (output.getvalue(), (tmp_path / "run.log").read_text()):
        assert "on average: test loss 1.500, macro-F1 37.5 %\n" in text
        assert "on average: test loss 2.000 → 1.500, macro-F1 29.2 → 37.5 %\n" in text


@pytest.mark.parametrize(("keep_best", "said"), [(None, True), ("test_loss", False)])
def test_who_stops_early_without_the_best_round_is_told_how_to_keep_it(keep_best: str | None, said: bool) -> None:
    state: Any = None
    output, share = io.StringIO(), {"a": 0.5}
    config = ExperimentConfig(early_stopping=EarlyStoppingConfig(2, "test_loss"), keep_best=keep_best)
    experiment = SimpleNamespace(**{**vars(EXPERIMENT), "config": config})
    with Console(None, PlainConsole(file=output)) as console:
        console.on_end(experiment, state, Outcome(1, share, share, share, None, "it has not improved"))
    told = "this run had no --keep_best test_loss, which keeps the best round for fedra evaluate --best\n"
    assert (told in output.getvalue()) is said


@pytest.mark.parametrize("terminal", [False, True])
def test_everything_is_in_the_log(tmp_path: Path, terminal: bool) -> None:
    run_two_rounds(tmp_path / "run.log", terminal)
    log = (tmp_path / "run.log").read_text()
    assert "\x1b" not in log
    for text in ("a [small] model", "round 1/2", "round 2/2", "after round 2", "frozen: 25.0", "tuned: 37.5"):
        assert text in log
    # Rounds are counted from 1 here, as on the screen.
    assert "'round': 0" not in log


@pytest.mark.parametrize("terminal", [False, True])
def test_who_wants_quiet_gets_the_table_alone_and_all_of_the_log(
    tmp_path: Path, terminal: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    engine = logging.getLogger("fedra_engine.execution.sweep")
    with Console(None, PlainConsole(file=io.StringIO()), results_only=True):
        engine.warning("out of memory")
    text = run_two_rounds(tmp_path / "run.log", terminal, results_only=True)
    assert [line.split()[0] for line in text.split("\n") if line] == ["accuracy", "frozen", "tuned"]
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "run.log").read_text()
    assert all(line in log for line in ("a [small] model", "round 1/2", "tuned: 37.5"))


def test_who_wants_quiet_is_told_that_a_run_was_stopped_early() -> None:
    state: Any = None
    output, share = io.StringIO(), {"a": 0.5}
    with Console(None, PlainConsole(file=output), results_only=True) as console:
        console.on_end(EXPERIMENT, state, Outcome(2, share, share, share, None, "it has not improved"))
        console.finish(WRITTEN)
    assert output.getvalue().startswith("stopped after round 2: it has not improved\n\naccuracy (%)")


@pytest.mark.parametrize(
    ("level", "kept"),
    [
        (logging.DEBUG, {"debug", "info", "warning", "round"}),
        (logging.INFO, {"info", "warning", "round"}),
        (logging.WARNING, {"warning"}),
        (logging.ERROR, set()),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_less_severe_than_the_level_is_neither_shown_nor_logged(
    tmp_path: Path,
    terminal: bool,
    level: int,
    kept: set[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    engine, output, log = logging.getLogger("fedra_engine.data"), io.StringIO(), tmp_path / "run.log"
    screen = PlainConsole(file=output, force_terminal=terminal, width=100, height=30)
    with Console(log, screen, config=ExperimentConfig(rounds=1), level=level) as console:
        for name in ("debug", "info", "warning"):
            getattr(engine, name)(f"engine's {name}")
        show_rounds(console, 1, {"clean": 0.5})
    for name in ("debug", "info", "warning"):
        assert (f"engine's {name}" in log.read_text()) == (name in kept)
    assert ("round 1/1" in log.read_text()) == ("round" in kept)
    assert "tuned: 50.0" in log.read_text()
    said = output.getvalue() + capsys.readouterr().err
    # In a terminal, details would push away what is above the display.
    shown = kept - {"debug", "round"} if terminal else kept
    assert {name for name in ("debug", "info", "warning") if f"engine's {name}" in said} == shown - {"round"}
    assert ("round 1/1" in said) == ("round" in shown)
    assert "tuned" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_resumed_run_counts_on(tmp_path: Path, terminal: bool) -> None:
    text = run_two_rounds(tmp_path / "run.log", terminal, first=1)
    assert "resumed after round 1 of 2 rounds" in text
    log = (tmp_path / "run.log").read_text()
    assert re.findall(r"  round (\d+/\d+) ", log) == ["2/2"]
    assert "accuracy after round 2: " in log
    if not terminal:
        assert [line.split()[1] for line in text.splitlines() if line.startswith("round ")] == ["2/2"]


def test_a_resumed_run_shows_where_it_was_and_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = None
    monkeypatch.setattr("fedra_engine.callbacks.console.describe", lambda _: {"model": "a model"})
    screen = PlainConsole(file=io.StringIO(), force_terminal=True, width=80, height=24)
    experiment = SimpleNamespace(**{**vars(EXPERIMENT), "config": ExperimentConfig(rounds=9)})
    with Console(None, screen, config=experiment.config) as console:
        records = [{"round": round, "loss": 2.0 - round} for round in range(2)]
        console.remember([*records, {"round": 2, "loss": 0.5, "accuracy": {"clean": 0.75}}])
        console.on_start(experiment, state, 3)
        console.on_evaluate(experiment, state, Evaluation({"clean": 0.25}))
        rows = [row.plain for row in console.view.rows(80, 24)]
    assert any("3 of 9" in row for row in rows if row.startswith("rounds "))
    assert any("0 of 3 clients" in row for row in rows if row.startswith("round 4 "))
    assert any(row.split() == ["clean", "25.0", "75.0", "+50.0", "▁█"] for row in rows)
    assert any(row.endswith("0.5000  █▃▁") for row in rows if row.startswith("loss "))


def test_the_display_is_there_at_once_and_says_what_is_slow_in_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_FIRST", 0.0)
    monkeypatch.setattr(console_module, "_SECONDS_BETWEEN_REFRESHES", 0.01)
    output, log = io.StringIO(), tmp_path / "run.log"
    screen = PlainConsole(file=output, force_terminal=True, width=80, height=24)
    with Console(log, screen, config=EXPERIMENT.config):
        assert "fedra, 2 rounds, seed 0" in output.getvalue()
        with Stage("decoding images", 2_780):
            wait_for(lambda: "decoding images, 0 of 2,780" in output.getvalue())
            wait_for(lambda: "decoding images … 0 of 2,780\n" in log.read_text())
    assert "images …" not in output.getvalue()


def test_a_slow_round_says_how_far_it_is_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_FIRST", 0.0)
    monkeypatch.setattr(console_module, "_SECONDS_BETWEEN_REFRESHES", 0.01)
    output = io.StringIO()
    with Console(None, PlainConsole(file=output)) as console:
        console.begin_round(8, 9)
        with Stage(LOCAL_STEPS, 40):
            wait_for(lambda: "round 9/9 … 0 of 40 local steps, 0 of ? clients\n" in output.getvalue())
        console.on_update(EXPERIMENT, update(8, 2, 20))
        with Stage(LOCAL_STEPS, 40) as stage:
            stage.advance(25)
            wait_for(lambda: "round 9/9 … 25 of 40 local steps, 2 of 3 clients\n" in output.getvalue())
    before = output.getvalue()
    with Stage(LOCAL_STEPS, 1):
        time.sleep(0.05)
    assert output.getvalue() == before


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_quick_rounds_have_no_line_but_their_own(tmp_path: Path) -> None:
    text = run_two_rounds(tmp_path / "run.log", terminal=False)
    assert "…" not in text + (tmp_path / "run.log").read_text()


def test_a_coloured_pipe_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = io.StringIO()
    with Console(None, PlainConsole(file=output), config=ExperimentConfig(rounds=1)) as console:
        show_rounds(console, 1, {"clean": 0.5})
    assert "x1b" not in repr(output.getvalue())
    assert "\nround 1/1  " in f"\n{output.getvalue()}"


@pytest.mark.parametrize("domain", ["[/red]", ":smile:", "[bold]x[/bold]"])
def test_domains_are_no_markup(tmp_path: Path, domain: str) -> None:
    output = io.StringIO()
    with Console(tmp_path / "run.log", PlainConsole(file=output)) as console:
        show_rounds(console, 1, {domain: 0.5})
    assert f"({domain} 50.0 %)" in output.getvalue()
    assert f"accuracy (%)  {domain}  average" in output.getvalue()
    assert f"tuned: 50.0 % ({domain} 50.0 %)" in (tmp_path / "run.log").read_text()


def test_no_name_puts_control_characters_into_the_log(tmp_path: Path) -> None:
    with Console(tmp_path / "run.log", PlainConsole(file=io.StringIO())) as console:
        show_rounds(console, 1, {"a\x1b[2J\udcff\nb": 0.5})
        logging.getLogger("fedra_engine.data").warning("in %s", "c\x1b[2J")
    log = (tmp_path / "run.log").read_text()
    assert "(a\\x1b[2J\\udcff\\nb 50.0 %)" in log
    assert "in c\\x1b[2J\n" in log


def test_a_table_wider_than_the_output_is_not_cut(tmp_path: Path) -> None:
    output = io.StringIO()
    accuracy = {f"domain {number}": 0.5 for number in range(20)}
    with Console(None, PlainConsole(file=output, width=40)) as console:
        show_rounds(console, 1, accuracy)
    assert ["tuned", *["50.0"] * 21] in [line.split() for line in output.getvalue().splitlines()]


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path) -> None:
    for _ in range(2):
        run_two_rounds(tmp_path / "run.log", terminal=False)
    assert (tmp_path / "run.log").read_text().count("tuned: 37.5") == 2


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (RuntimeError(), "RuntimeError"),
        (Interrupted(signal.SIGTERM), "terminated"),
        (KeyboardInterrupt(), "interrupted"),
        (InputError("rounds: found nothing"), "rounds: found nothing"),
    ],
)
def test_the_log_tells_what_stopped_a_run(tmp_path: Path, error: BaseException, text: str) -> None:
    def fail() -> None:
        with Console(tmp_path / "run.log", PlainConsole(file=io.StringIO())):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (tmp_path / "run.log").read_text().endswith(f"  stopped: {text}\n")


def test_a_display_shows_an_interrupt_itself() -> None:
    screen = PlainConsole(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with Console(None, screen, config=EXPERIMENT.config) as console:
        assert exit_codes._Watch.show is not None
        exit_codes._Watch.show("interrupted")
        assert "now       interrupted" in [row.plain for row in console.view.rows(80, 24)]
    assert exit_codes._Watch.show is None


class Terminal(io.StringIO):
    """Can go away, as one does whose window is closed."""

    is_gone = False

    def write(self, text: str) -> int:
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("when", ["at the start", "in the run", "interrupted at the end"])
def test_whatever_ends_a_run_and_its_display_the_error_is_logged_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with console:
            terminal.is_gone = when == "in the run"
            raise RuntimeError("out of memory")

    engine, terminal = logging.getLogger("fedra_engine"), Terminal()
    before = ([*engine.handlers], engine.level, sys.stdout, sys.stderr)
    console = Console(tmp_path / "run.log", PlainConsole(file=terminal, force_terminal=True, width=80, height=24))
    if when == "interrupted at the end":
        monkeypatch.setattr(console._thread, "join", interrupt)
    terminal.is_gone = when == "at the start"
    expected = {"at the start": OSError, "in the run": RuntimeError, "interrupted at the end": KeyboardInterrupt}
    with pytest.raises(expected[when]):
        run()
    assert ([*engine.handlers], engine.level, sys.stdout, sys.stderr) == before
    if when != "at the start":
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


@pytest.mark.parametrize("same", [False, True])
def test_in_a_terminal_warnings_go_where_stderr_goes(monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    terminal, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(errors, "isatty", lambda: same)
    monkeypatch.setattr(sys, "stderr", errors)
    with Console(None, PlainConsole(file=terminal, force_terminal=True, width=80, height=24)):
        logging.getLogger("fedra_engine.data").warning("a small model")
    assert ("a small model" in terminal.getvalue(), "a small model" in errors.getvalue()) == (same, not same)


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

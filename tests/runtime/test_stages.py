"""What takes long says so, on the console and in the log."""

import io
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedra_engine import experiment
from fedra_engine.callback import Round, Update
from fedra_engine.callbacks.console import Console
from fedra_engine.config import DataConfig, ExperimentConfig
from fedra_engine.experiment import build_experiment
from fedra_engine.federation.records import RoundMetrics, Tally
from fedra_engine.runtime import stages
from fedra_engine.runtime.stages import Stage
from fedra_engine.runtime.tables import PlainConsole

ENGINE_LOG = logging.getLogger("fedra_engine")


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_FIRST", 0.01)
    monkeypatch.setattr(stages, "_LONGEST", 0.01)


def test_it_says_at_once_what_is_done_and_then_how_far_it_is(tmp_path: Path, impatient: None) -> None:
    output, log = io.StringIO(), tmp_path / "run.log"
    with Console(log, PlainConsole(file=output)):
        with Stage("decoding images", 2_780) as stage:
            wait_for(lambda: "decoding images … 0 of 2,780\n" in output.getvalue())
            stage.advance(1_000)
            stage.advance(16)
            wait_for(lambda: "decoding images … 1,016 of 2,780\n" in output.getvalue())
        with Stage("loading the model"):
            wait_for(lambda: "loading the model …\n" in output.getvalue())
    assert "decoding images … 1,016 of 2,780\n" in log.read_text()


def test_it_is_silent_where_nothing_takes_long_or_nobody_listens(impatient: None, capfd: pytest.CaptureFixture) -> None:
    before = threading.active_count()
    with Stage("without a run"), Console.silent(), Stage("of another process"):
        assert threading.active_count() == before
    assert capfd.readouterr() == ("", "")


def test_a_short_stage_says_nothing() -> None:
    output = io.StringIO()
    with Console(None, PlainConsole(file=output)), Stage("short"):
        pass
    assert output.getvalue() == ""
    assert ENGINE_LOG.level == logging.NOTSET
    assert ENGINE_LOG.handlers == []


def test_a_round_says_how_many_clients_have_trained(impatient: None) -> None:
    output = io.StringIO()
    nothing: Any = None
    with Console(None, PlainConsole(file=output, force_terminal=False)) as console:
        console.begin_round(8, 9)
        wait_for(lambda: "training clients of round 9 of 9 …\n" in output.getvalue())
        for clients in (1, 3):
            tally = Tally(clients, samples=8, loss=torch.tensor(8.0))
            console.on_update(nothing, Update(8, 4, tally, nothing, nothing, nothing))
        wait_for(lambda: "training clients of round 9 of 9 … 3 of 4\n" in output.getvalue())
        metrics = RoundMetrics(8, participants=3, samples=8, loss=1.0, lr=0.1, blocks_held=2, seconds=1.0)
        console.on_round(nothing, nothing, Round(metrics, nothing, nothing, nothing))
        # A line that is being written may still come.
        time.sleep(0.05)
        said = output.getvalue()
        time.sleep(0.05)
        assert output.getvalue() == said


@pytest.mark.parametrize("size", [None, 8])
def test_the_models_own_size_is_warned_of_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int | None
) -> None:
    monkeypatch.setattr(experiment, "_LONG", 0.0)
    build_experiment(ExperimentConfig(data=DataConfig(image_size=size)), torch.device("cpu"))
    found = [record.getMessage() for record in caplog.records if "data.image_size" in record.getMessage()]
    assert len(found) == (size is None)
    assert all("the model's own 8 pixels are" in text and "a smaller data.image_size" in text for text in found)

"""Runs that report to the real trackers, none of which needs a server, and to one that fails."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import GeneralTracker

from fedra_engine.callbacks import trackers
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.callbacks.trackers import Trackers, make_tracker, numbers_of, plain_settings, values_of
from fedra_engine.config import DeviceConfig, ExperimentConfig
from fedra_engine.runtime.errors import InputError
from tests.running import continue_run, run_experiment, small_config


def points_of(folder: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, as TensorBoard shows those in `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.fixture(scope="session")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trackio has its database, which it reads once, when it is imported."""
    assert "trackio" not in sys.modules
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
    return Path(os.environ["TRACKIO_DIR"])


@pytest.mark.slow
def test_every_tracker_gets_the_settings_and_the_metrics_of_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trackio_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    # Without a database, which mlflow-skinny lacks.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = run_experiment(tmp_path, evaluate_every=1, report_to=["tensorboard", "wandb", "mlflow", "trackio"])

    first, second = RunFolder(run).read_metrics()
    losses = [(1, first["loss"]), (2, second["loss"])]
    assert dict(points_of(run / "tensorboard", "loss")) == pytest.approx(dict(losses))
    summary = json.loads((run / "summary.json").read_text())
    frozen = {"accuracy": summary["frozen"], "macro_f1": summary["measures"]["macro_f1"]["frozen"]}
    for measure in ("accuracy", "macro_f1"):
        averages = [mean(of[measure].values()) for of in (frozen, first, second)]
        points = dict(points_of(run / "tensorboard", f"average_{measure}"))
        assert points == pytest.approx(dict(enumerate(averages)))

    (metrics,) = (tmp_path / "mlflow").glob("*/*/metrics")
    lines = [line.split() for line in (metrics / "loss").read_text().splitlines()]
    assert [(int(step), float(value)) for _, value, step in lines] == losses
    assert (metrics.parent / "params" / "method.name").read_text() == "fedra"

    (record,) = (run / "wandb").glob("offline-run-*/*.wandb")
    for word in ("average_accuracy", "test_loss/", str(second["loss"]), "max_local_steps"):
        assert word.encode() in record.read_bytes()

    (database,) = trackio_folder.glob("fedra-engine.db")
    with closing(sqlite3.connect(database)) as tables:
        logged = [(step, json.loads(line)) for step, line in tables.execute("select step, metrics from metrics")]
        ((settings,),) = tables.execute("select config from configs")
    assert [(step, values["loss"]) for step, values in logged if "loss" in values] == losses
    assert json.loads(settings)["method.name"] == "fedra"
    said = [line for line in capsys.readouterr().out.splitlines() if "rackio" in line]
    assert said == ["trackio      trackio show --project fedra-engine"]


@pytest.mark.slow
def test_a_run_that_breaks_off_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    exit_codes, finish_run = list[int | None](), wandb.Run.finish

    def finish(run: wandb.Run, exit_code: int | None = None) -> None:
        exit_codes.append(exit_code)
        finish_run(run, exit_code)

    def break_off() -> None:
        PartialState(cpu=True)
        experiment: Any = SimpleNamespace(config=ExperimentConfig())
        state: Any = None
        with Trackers(RunFolder(tmp_path), ["wandb", "mlflow"]) as begun:
            begun.on_start(experiment, state, 0)
            raise RuntimeError("out of memory")

    monkeypatch.setattr(wandb.Run, "finish", finish)
    with pytest.raises(RuntimeError, match="out of memory"):
        break_off()
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (run.info.status, exit_codes) == ("FAILED", [1])


@pytest.mark.slow
def test_a_run_that_goes_on_has_every_round_once(tmp_path: Path) -> None:
    run = run_experiment(tmp_path, rounds=1, report_to=["tensorboard"], training={"lr_schedule": "constant"})
    begun = {metric: points_of(run / "tensorboard", metric) for metric in ("loss", "average_test_loss")}
    longer = small_config(tmp_path, rounds=2, report_to=["tensorboard"], training={"lr_schedule": "constant"})
    continue_run(longer, RunFolder(run))
    for metric, first in (("loss", 1), ("average_test_loss", 0)):
        whole = points_of(run / "tensorboard", metric)
        assert [step for step, _ in whole] == [*range(first, 3)]
        assert whole[:-1] == begun[metric]


class Broken(GeneralTracker):
    name, requires_logging_directory = "broken", False
    tracker = None
    finished = 0

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        pass

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == 1:
            raise ConnectionError("no route to host")

    def finish(self) -> None:
        self.finished += 1


def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "make_tracker", lambda name, folder: Broken())
    with caplog.at_level(logging.WARNING, "fedra_engine"):
        run = run_experiment(tmp_path, report_to=["tensorboard"])
    assert (run / "summary.json").is_file()
    assert [record.getMessage() for record in caplog.records if "report_to" in record.getMessage()] == [
        "report_to: tensorboard failed and gets nothing more of this run: no route to host"
    ]


def test_what_another_tracker_than_trackio_prints_at_its_start_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Broken, "start", lambda _: print("see it on the server"))
    trackers.start(Broken())
    assert capsys.readouterr().out == "see it on the server\n"


@pytest.mark.parametrize(("step", "finished"), [("start", 0), ("store_init_configuration", 1)])
def test_a_tracker_that_does_not_start_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, finished: int
) -> None:
    """And is finished if it has begun, or a later run of this process would find it active."""

    def fail(tracker: Broken, *args: Any) -> None:
        raise ConnectionError("no route to host")

    tracker = Broken()
    monkeypatch.setattr(trackers, "make_tracker", lambda name, folder: tracker)
    monkeypatch.setattr(Broken, step, fail)
    with pytest.raises(InputError, match=r"^report_to: found mlflow, which does not start \(no route to host\)"):
        run_experiment(tmp_path, report_to=["mlflow"])
    assert tracker.finished == finished


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report_to: found nowhere, which is not installed, expected one that is \("):
        Trackers(RunFolder(tmp_path), ["nowhere"])


@pytest.mark.slow
def test_wandb_never_asks_for_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose question the live display would hide."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    wandb.teardown()
    try:
        with pytest.raises(InputError, match=r"^report_to: found no login for wandb, expected one \(wandb login\), or"):
            Trackers(RunFolder(tmp_path), ["wandb"])
        monkeypatch.setenv("WANDB_API_KEY", "too short")
        with pytest.raises(InputError, match=r"^report_to: found wandb, which does not start \(WANDB_API_KEY invalid"):
            Trackers(RunFolder(tmp_path), ["wandb"])
        monkeypatch.delenv("WANDB_API_KEY")
        # As the message says, in the same process.
        monkeypatch.setenv("WANDB_MODE", "offline")
        Trackers(RunFolder(tmp_path), ["wandb"])
        PartialState(cpu=True)
        tracker = make_tracker("wandb", tmp_path)
        tracker.start()
        tracker.finish()
        assert [*tmp_path.glob("wandb/offline-run-*/*.wandb")]
    finally:
        wandb.teardown()


def test_names_of_metrics_and_settings_are_those_that_all_trackers_take() -> None:
    assert numbers_of({"round": 3, "loss": None, "lr": 0.5, "bad_clients": [1], "accuracy": {"a": 0.5}}) == {"lr": 0.5}
    assert values_of({"accuracy": {"a/b": 0.5, "c d": 1.0}}) == {
        "average_accuracy": 0.75,
        "accuracy/a_b": 0.5,
        "accuracy/c d": 1.0,
    }
    for undefined in (None, math.nan, math.inf):
        assert values_of({"perplexity": {"a": 2.0, "b": undefined}}) == {"perplexity/a": 2.0}
    config = ExperimentConfig()
    config.clients.devices = [DeviceConfig(compute=2.0)]
    values = plain_settings(config)
    assert values["method.name"] == "fedra"
    assert json.loads(str(values["clients.devices"]))[0]["compute"] == 2.0
    assert not any("[" in name for name in values)

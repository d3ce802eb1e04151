"""A run whose loss on held-out samples has risen is told of, in one wording wherever that is shown."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedra_engine import ExperimentConfig, Outcome, simulate
from fedra_engine.callbacks.loss_watch import LossWatch
from fedra_engine.federation.rising_loss import BeforeAndAfter, loss_warnings
from fedra_engine.report import words
from fedra_engine.report.facts import read_run
from tests.report.run_folders import DOMAINS, write_run
from tests.running import small_config

BETTER, WORSE = BeforeAndAfter(0.4, 0.6), BeforeAndAfter(0.6, 0.4)
CONFIDENT = (
    "The loss on test samples rose from 1.000 to 1.500 while the accuracy rose, too: the tuned model is overconfident "
    "where it is wrong."
)
LATER = (
    "The loss on test samples was lowest after round 2 (0.5000) and is 1.500 after the last round: fewer rounds or a "
    "lower training.lr may give better-calibrated probabilities; choose them with data.validation_fraction."
)


@pytest.mark.parametrize(
    ("accuracy", "loss", "by_round", "expected"),
    [
        (BETTER, (1.0, 1.5), {2: 1.4, 4: 1.5}, [CONFIDENT]),
        (BETTER, (1.0, 1.5), {2: 0.5, 4: 1.5}, [CONFIDENT, LATER]),
        (BETTER, (2.0, 1.5), {2: 0.5, 3: math.nan, 4: 1.5}, [LATER]),
        (WORSE, (1.0, 1.5), {2: 1.45, 4: 1.5}, []),
        (BETTER, (1.0, 1.005), {}, []),
        (BETTER, (1.0, math.nan), {2: 0.5}, []),
        (BETTER, (math.nan, 1.5), {}, []),
        (BETTER, (1.0, math.inf), {2: 0.5}, []),
    ],
)
def test_what_is_said(
    accuracy: BeforeAndAfter, loss: tuple[float, float], by_round: dict[int, float], expected: list[str]
) -> None:
    assert loss_warnings(accuracy, BeforeAndAfter(*loss), by_round, "test") == expected


def test_who_chooses_on_validation_samples_is_not_told_to() -> None:
    (said,) = loss_warnings(BETTER, BeforeAndAfter(2.0, 1.5), {2: 0.5}, "validation")
    assert said.startswith("The loss on validation samples was lowest after round 2 ")
    assert said.endswith("may give better-calibrated probabilities.")


def test_the_report_says_it(tmp_path: Path) -> None:
    loss = {"frozen": dict.fromkeys(DOMAINS, 1.0), "average_frozen": 1.0, "average_tuned": 1.5}
    told = {"measures": {"test_loss": loss | {"tuned": dict.fromkeys(DOMAINS, 1.5)}}}
    run = read_run(write_run(tmp_path, rounds=2, of_summary=told))
    assert words.warnings(run) == [CONFIDENT]


def test_a_run_and_its_report_say_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a learning rate that makes the loss rise after the first round."""
    config = small_config(
        tmp_path,
        data={"domains": ["clean", "inverted"], "clients_per_domain": 1},
        clients={"capacities": [12]},
        training={"batch_size": 6, "max_local_steps": 6, "lr": 0.5, "lr_schedule": "constant"},
        evaluate_every=1,
    )
    folder = simulate(config, quiet=True).folder
    (said,) = words.warnings(read_run(folder))
    assert said.startswith("The loss on test samples was lowest after round 1 (")
    assert said in caplog.messages
    assert said in (folder / "run.log").read_text()


def test_a_resumed_run_remembers_earlier_losses(caplog: pytest.LogCaptureFixture) -> None:
    experiment: Any = SimpleNamespace(config=ExperimentConfig())
    state: Any = None
    accuracy, before, after = {"a": 0.5}, {"test_loss": {"a": 2.0}}, {"test_loss": {"a": 1.5}}
    watch = LossWatch([{"round": 1, "test_loss": {"a": 0.5}}, {"round": 2}])
    watch.on_end(experiment, state, Outcome(4, accuracy, accuracy, accuracy, None, None, before, after))
    assert caplog.messages == [LATER]

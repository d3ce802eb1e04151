"""What a run hands to its user is shown in a line, without tensors, wherever Python prints it."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedra_engine import (
    Callback,
    ClientsConfig,
    DataConfig,
    DeviceConfig,
    Evaluation,
    Experiment,
    ExperimentConfig,
    Outcome,
    Result,
    load_run,
    simulate,
)
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.updates import ClientUpdate
from tests.running import small_config

LONGEST = 160
"""Two lines of a terminal."""
FEW: dict[str, Any] = {
    "data": {"domains": ["clean", "inverted"], "clients_per_domain": 2},
    "clients": {"capacities": [12, 3]},
    "method": {"stand_in": "linear", "stand_in_rank": 2, "stand_in_samples": 8},
}


class Shown(Callback):
    """Keeps how everything is shown that a callback gets, and what is in it, by the name of its class."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def on_start(self, experiment: Experiment, *others: Any) -> None:
        self._keep(experiment, experiment.method.federation, experiment.costs(), *others)

    def on_update(self, experiment: Experiment, *others: Any) -> None:
        self._keep(*others, others[0].updates.of_client(0))

    def on_evaluate(self, experiment: Experiment, *others: Any) -> None:
        self._keep(*others)

    on_round = on_end = on_evaluate

    def _keep(self, *values: Any) -> None:
        for value in values:
            if type(value).__name__.endswith("Config"):
                continue
            if is_dataclass(value) or isinstance(value, ClientUpdate):
                self.texts[type(value).__name__] = repr(value)
            if is_dataclass(value):
                self._keep(*(getattr(value, each.name) for each in fields(value)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Result]:
    callback = Shown()
    result = simulate(small_config(tmp_path_factory.mktemp("runs"), **FEW), callbacks=[callback], quiet=True)
    return callback.texts, result


def test_everything_is_a_line(shown: tuple[dict[str, str], Result]) -> None:
    texts, _ = shown
    assert {"Experiment", "GlobalState", "Update", "Round", "Evaluation", "Outcome", "Foundation"} <= set(texts)
    assert {
        name: text
        for name, text in texts.items()
        if len(text) > LONGEST or any(mark in text for mark in ("tensor(", "array(", "\n", " object at "))
    } == {}


def test_a_configuration_is_what_differs_from_the_defaults() -> None:
    devices = [DeviceConfig(memory=2.0)]
    config = ExperimentConfig(rounds=20, data=DataConfig(domains=["a"]), clients=ClientsConfig(devices=devices))
    assert repr(ExperimentConfig()) == "ExperimentConfig()"
    assert repr(config).startswith("ExperimentConfig(rounds=20, data.domains=['a'], clients.devices=[DeviceConfig(")
    config.data.domain = "a"
    assert repr(config).startswith("ExperimentConfig(data.domain: found no field of that name, ")


def test_what_is_empty_or_damaged_is_shown_too(shown: tuple[dict[str, str], Result], tmp_path: Path) -> None:
    assert repr(Evaluation({})) == "Evaluation(frozen model: average accuracy –)"
    assert repr(Outcome(1, {}, {}, {})) == "Outcome(1 round: average accuracy – → –)"
    folder = Path(shutil.copytree(shown[1].folder, tmp_path / "run"))
    for damaged in ("{}", "{"):
        (folder / "summary.json").write_text(damaged)
        assert repr(load_run(folder)) == f"Result({folder}, with a damaged summary)"


def test_a_line_says_what_a_reader_wants(shown: tuple[dict[str, str], Result]) -> None:
    texts, _ = shown
    model = "ViTForImageClassification"
    assert texts["Experiment"] == f"Experiment(fedra, 2 rounds, 4 clients in 2 domains, {model})"
    assert texts["Foundation"] == f"Foundation({model}, 12 blocks)"
    assert texts["DomainData"] == "DomainData(image_classification: 280 samples in 2 domains)"
    assert texts["Clients"] == "Clients(4, 280 training samples, 3 to 12 blocks)"
    assert texts["GlobalState"] == "GlobalState(adapters [12, 7168], heads [1, 650], stand-ins)"
    assert texts["LocalWork"] == "LocalWork(round 2: 2 participants, learning rate 0.0025)"
    assert texts["ClientCosts"].startswith("ClientCosts(2 participants with 3 to 12 blocks: at most ")
    assert texts["Assignment"] == "Assignment(2 participants hold 3 to 12 of 12 blocks)"
    assert texts["Update"] == "Update(round 2: 2 of 2 participants trained, ClientUpdates(of clients 1, 2))"
    assert re.fullmatch(r"Round\(round 2: 2 participants, loss [1-9]\.[0-9]{1,3}\)", texts["Round"])
    assert re.fullmatch(r"Evaluation\(after round 2: average accuracy [0-9]{2}\.[0-9] %\)", texts["Evaluation"])
    assert re.fullmatch(r"Outcome\(2 rounds: average accuracy [0-9.]{4} → [0-9.]{4} %\)", texts["Outcome"])


def test_a_result_says_where_it_is_and_what_came_of_it(shown: tuple[dict[str, str], Result]) -> None:
    _, result = shown
    before, after = (f"{100 * result.summary[f'average_{when}']:.1f}" for when in ("frozen", "tuned"))
    assert repr(load_run(result.folder)) == f"Result({result.folder}, 2 rounds: average accuracy {before} → {after} %)"


def test_all_clients_may_hold_the_same() -> None:
    clients = Clients([np.arange(3)], np.zeros(1, dtype=np.int64), np.array([4]))
    assert repr(clients) == "Clients(1, 3 training samples, 4 blocks)"
    assert repr(replace(clients, sizes=np.array([1]))) == "Clients(1, 1 training sample, 4 blocks)"

"""What a round trains, and what is shown of an experiment before the first one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedra_engine.callbacks.description import describe
from fedra_engine.config import DeviceConfig
from fedra_engine.experiment import build_experiment
from tests.running import small_config
from tests.tiny import TARGETS, make_tiny


def test_a_round_is_trained_by_those_that_hold_something_and_arrive() -> None:
    devices = [DeviceConfig(), DeviceConfig(dropout=1.0)]
    changes = {"data": {"domains": ["clean", "noisy"]}, "method": {"name": "exclusivefl"}}
    clients = {"sampling": "uniform", "capacities": [12], "devices": devices}
    experiment = build_experiment(small_config(Path(), clients=clients, **changes), torch.device("cpu"))
    asked, assignment = experiment.assigned_work(0)
    assert asked.participants.tolist() == list(range(10))
    work, arrived, simulated = experiment.round_work(0)
    assert work == replace(asked, participants=work.participants)
    assert work.participants.tolist() == list(range(5))
    np.testing.assert_array_equal(arrived.held, assignment.held[:5])
    assert simulated is not None
    assert simulated.dropped == 5


def test_clients_that_hold_nothing_take_no_part() -> None:
    changes = {"data": {"domains": ["clean", "noisy"]}, "method": {"name": "exclusivefl"}}
    config = small_config(Path(), clients={"sampling": "uniform", "capacities": [12, 6]}, **changes)
    work, assignment, simulated = build_experiment(config, torch.device("cpu")).round_work(0)
    assert work.participants.tolist() == list(range(5))
    assert assignment.held.all()
    assert simulated is None


def test_a_head_is_described_by_its_trained_parameters() -> None:
    config = small_config(Path())
    experiment = build_experiment(config, torch.device("cpu"))
    assert describe(experiment)["head"] == f"{64 * 10 + 10} parameters"
    without_bias = make_tiny("llama", replace(config.lora, target_modules=TARGETS["llama"]))
    head = without_bias.head
    assert head.bias is None
    facts = describe(replace(experiment, foundation=without_bias))
    assert facts["head"] == f"{head.in_features * head.out_features} parameters"

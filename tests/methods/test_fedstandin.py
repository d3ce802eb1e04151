"""FedStandIn is FedRA with stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from fedra_engine.config.validation import validate
from fedra_engine.experiment import build_experiment
from fedra_engine.models.state import GlobalState
from fedra_engine.simulation import train_round
from tests.running import small_config


def after_a_round(folder: Path, name: str, stand_in: Literal["none", "linear"]) -> GlobalState:
    config = small_config(folder, method={"name": name, "stand_in": stand_in, "stand_in_samples": 50})
    validate(config)
    experiment = build_experiment(config, torch.device("cpu"))
    return train_round(experiment, experiment.initial_state, 0)[0]


def test_a_round_is_that_of_fedra_with_stand_ins(tmp_path: Path) -> None:
    state, expected = after_a_round(tmp_path, "fedstandin", "none"), after_a_round(tmp_path, "fedra", "linear")
    assert state.stand_ins is not None
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, rtol=0, atol=0)

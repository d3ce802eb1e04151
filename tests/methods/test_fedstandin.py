"""FedStandIn is FedRA with stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from fedra_engine.experiment import build_experiment
from fedra_engine.models.state import GlobalState
from fedra_engine.simulation import train_round
from tests.running import small_config

FEW = {"stand_in_samples": 50}


def after_a_round(folder: Path, name: str, stand_in: Literal["none", "linear"] | None) -> GlobalState:
    config = small_config(folder, method={"name": name, "stand_in": stand_in, **(FEW if stand_in != "none" else {})})
    experiment = build_experiment(config, torch.device("cpu"))
    return train_round(experiment, experiment.initial_state, 0)[0]


@pytest.mark.parametrize(("own", "fedra"), [(None, "linear"), ("none", "none")])
def test_a_round_is_that_of_fedra(
    tmp_path: Path, own: Literal["none"] | None, fedra: Literal["none", "linear"]
) -> None:
    state, expected = after_a_round(tmp_path, "fedstandin", own), after_a_round(tmp_path, "fedra", fedra)
    assert (state.stand_ins is None) == (fedra == "none")
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, rtol=0, atol=0)

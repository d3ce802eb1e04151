"""What a client's sub-model costs, against figures computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedra_engine.config import ExperimentConfig
from fedra_engine.costs import ClientCosts, client_costs
from fedra_engine.experiment import build_experiment
from tests.running import small_config

# The embedded model: width 64, MLP 128, twelve blocks, ten digits, adapters of rank 8 on all six Linears.
BLOCK = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 4 * 64
SLOT = 8 * (4 * (64 + 64) + 2 * (64 + 128))
HEAD = 65 * 10


def costs_of(config: ExperimentConfig) -> dict[int, ClientCosts]:
    """By blocks held."""
    experiment = build_experiment(config, torch.device("cpu"))
    found = client_costs(config, experiment, np.arange(0, len(experiment.clients), 5))
    return {cost.blocks: cost for cost in found}


@pytest.fixture(scope="module")
def costs() -> dict[int, ClientCosts]:
    return costs_of(small_config(Path()))


def test_parameters_and_bytes_grow_with_the_blocks(costs: dict[int, ClientCosts]) -> None:
    assert sorted(costs) == [3, 4, 6, 8, 10, 12]
    for blocks, cost in costs.items():
        assert cost.trained == blocks * SLOT + HEAD
        assert cost.uploaded == 4 * cost.trained
        # Values, gradients and two moments of AdamW.
        assert cost.trained_memory == 4 * 4 * cost.trained
        assert cost.frozen_memory == costs[3].frozen_memory + 4 * (blocks - 3) * BLOCK
        assert cost.memory == cost.frozen_memory + cost.trained_memory + cost.activation_memory


def test_activations_and_flops_are_a_constant_and_a_share_for_each_block(costs: dict[int, ClientCosts]) -> None:
    for value in ("activation_memory", "flops"):
        by_blocks = {blocks: getattr(cost, value) for blocks, cost in costs.items()}
        share = by_blocks[4] - by_blocks[3]
        assert share > 0
        for blocks, found in by_blocks.items():
            assert found == pytest.approx(by_blocks[3] + (blocks - 3) * share, rel=0.02)


def test_activations_grow_with_the_batch_and_moments_with_the_optimizer(costs: dict[int, ClientCosts]) -> None:
    config = small_config(Path(), training={"batch_size": 3, "optimizer": "sgd", "momentum": 0.0})
    cost = costs_of(config)[4]
    assert cost.activation_memory == pytest.approx(costs[4].activation_memory / 2, rel=1e-3)
    assert cost.trained_memory == costs[4].trained_memory / 2


def test_low_precision_halves_the_weights_but_not_what_is_trained(costs: dict[int, ClientCosts]) -> None:
    config = small_config(Path(), model={"dtype": "bfloat16"})
    cost = costs_of(replace(config, lora=replace(config.lora, dropout=0.1)))[4]
    assert cost.frozen_memory == costs[4].frozen_memory / 2
    assert cost.trained_memory == costs[4].trained_memory

"""What clients' sub-models cost, against figures computed by hand and against real sub-models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedra_engine.config import ExperimentConfig, LoraConfig, TrainingConfig
from fedra_engine.costs.model import ClientCosts, CostModel
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.memory import saved_bytes
from fedra_engine.execution.sequential import Submodel
from fedra_engine.experiment import build_experiment
from fedra_engine.federation.assignment import Assignment
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.state import GlobalState
from tests.running import small_config
from tests.tiny import DEPTH, TARGETS, make_samples, make_tiny

# The embedded model: width 64, MLP 128, twelve blocks, ten digits, adapters of rank 8 on all six Linears.
BLOCK = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 4 * 64
SLOT = 8 * (4 * (64 + 64) + 2 * (64 + 128))
HEAD = 65 * 10
# In the order of the clients' domains.
CAPACITIES = [12, 10, 8, 6, 4, 3]


def costs_of(config: ExperimentConfig) -> ClientCosts:
    """One client of each domain."""
    experiment = build_experiment(config, torch.device("cpu"))
    model = CostModel(experiment.foundation, experiment.train_samples, config.lora, config.training)
    clients = np.arange(0, len(experiment.clients), 5)
    return model.count(experiment.clients, clients, experiment.method.assign(clients, 0), experiment.method)


@pytest.fixture(scope="module")
def costs() -> ClientCosts:
    return costs_of(small_config(Path()))


def test_parameters_and_bytes_grow_with_the_blocks(costs: ClientCosts) -> None:
    blocks = np.array(CAPACITIES)
    assert costs.blocks.tolist() == CAPACITIES
    assert costs.trained.tolist() == (blocks * SLOT + HEAD).tolist()
    assert costs.uploaded.tolist() == costs.downloaded.tolist() == (4 * costs.trained).tolist()
    # Values, gradients and two moments of AdamW.
    assert costs.trained_memory.tolist() == (4 * 4 * costs.trained).tolist()
    assert (costs.frozen_memory - costs.frozen_memory[-1]).tolist() == (4 * (blocks - 3) * BLOCK).tolist()
    assert costs.memory[0] == costs.frozen_memory[0] + costs.trained_memory[0] + costs.activation_memory[0]
    # Two steps of six samples.
    assert costs.samples.tolist() == [12] * 6
    assert costs.flops.tolist() == (12 * costs.sample_flops).tolist()


def test_activations_grow_with_the_batch_and_moments_with_the_optimizer(costs: ClientCosts) -> None:
    config = small_config(Path(), training={"batch_size": 3, "optimizer": "sgd", "momentum": 0.0})
    other = costs_of(config)
    assert other.activation_memory.tolist() == (costs.activation_memory / 2).tolist()
    assert other.trained_memory.tolist() == (costs.trained_memory / 2).tolist()


def test_low_precision_halves_the_weights_but_not_what_is_trained(costs: ClientCosts) -> None:
    config = small_config(Path(), model={"dtype": "bfloat16"})
    other = costs_of(replace(config, lora=replace(config.lora, dropout=0.1)))
    assert other.frozen_memory.tolist() == (costs.frozen_memory / 2).tolist()
    assert other.trained_memory.tolist() == costs.trained_memory.tolist()


@pytest.mark.parametrize(
    ("method", "uploaded", "downloaded"),
    [
        # Half of an adapter's parameters are A's, half B's: the embedded model's targets have equal sums of widths.
        ("ffalora", SLOT / 2, SLOT / 2),
        ("fedsalora", SLOT / 2, SLOT / 2),
        ("rolora", SLOT / 2, SLOT),
        # The change of the weights is counted below.
        ("flora", SLOT, None),
    ],
)
def test_what_a_method_keeps_or_knows_is_not_sent(method: str, uploaded: float, downloaded: float | None) -> None:
    experiment = build_experiment(small_config(Path(), method={"name": method}), torch.device("cpu"))
    config = small_config(Path())
    model = CostModel(experiment.foundation, experiment.train_samples, config.lora, config.training)
    clients = np.arange(0, 30, 5)
    assignment = experiment.method.assign(clients, 0)
    costs = model.count(experiment.clients, clients, assignment, experiment.method)
    blocks = np.array(CAPACITIES)
    assert costs.uploaded.tolist() == (4 * (blocks * uploaded + HEAD)).tolist()
    if downloaded is not None:
        assert costs.downloaded.tolist() == (4 * (blocks * downloaded + HEAD)).tolist()
    else:
        ranks = 8 * assignment.held.sum(axis=0)
        # Four Linears of 64 × 64, and two of 64 × 128.
        change = 4 * np.minimum(ranks * 128, 64 * 64) + 2 * np.minimum(ranks * 192, 64 * 128)
        expected = 4 * (blocks * SLOT + HEAD + assignment.held @ change)
        assert costs.downloaded.tolist() == expected.tolist()


def rows(*held: list[int]) -> np.ndarray:
    return np.array([np.isin(np.arange(DEPTH), blocks) for blocks in held])


def kept_bytes(submodel: Submodel, inputs: dict[str, torch.Tensor], keys: DropoutKeys) -> int:
    """Of a pass with loss, besides the weights."""
    weights = [*submodel.model.parameters(), *submodel.model.buffers(), *submodel.parameters()]
    return saved_bytes(lambda: nn.functional.log_softmax(submodel.logits(inputs, keys)[0], dim=-1).sum(), weights)


@pytest.mark.parametrize("family", ["vit", "bert", "gpt2", "llama", "timm_mixer"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "assignment",
    [
        Assignment(rows([0, 1, 3], [2], [0, 1, 2, 3])),
        Assignment(rows([0, 1, 3], [1, 2], [0, 1, 2, 3]), trained=rows([1, 3], [2], [3])),
        Assignment(rows([0, 1, 3], [2], [0, 1, 2, 3]), factors="B"),
        Assignment(rows([0, 1, 3], [2], [0, 1, 2, 3]), ranks=np.array([1, 3, 4])),
    ],
    ids=["both factors", "some blocks trained", "B only", "several ranks"],
)
def test_memory_is_that_of_the_real_submodels(family: str, dropout: float, assignment: Assignment) -> None:
    lora = LoraConfig(rank=4, alpha=8, dropout=dropout, target_modules=TARGETS[family])
    foundation, samples = make_tiny(family, lora), make_samples(family, 6)
    adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=torch.float64)
    state = GlobalState(adapters, foundation.initial_heads())
    model = CostModel(foundation, samples, lora, TrainingConfig(batch_size=2))
    activations = 2 * model._activation_bytes(assignment)
    longest = 0 if samples.lengths is None else int(samples.lengths.argmax())
    inputs = samples.inputs(torch.full((2,), longest), torch.device("cpu"), torch.float64)
    for row, counted in enumerate(activations):
        submodel = Submodel(foundation, lora, assignment, row, 0, state)
        kept = kept_bytes(submodel, inputs, DropoutKeys(dropout, seed=0, round=0, clients=[0], steps=[0]))
        # The first trained block keeps less than others, for its input needs no gradient; blocks that are held but not
        # trained keep no inputs of adapters.
        exact = assignment.held[row, 0] and assignment.trained is None
        assert 0.99 * counted <= kept <= 1.01 * counted if exact else 0.5 * counted <= kept <= 1.01 * counted

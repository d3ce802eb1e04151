"""Cards as the hub reads them: what it needs in front, and the figures of the summary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from fedra_engine import build
from fedra_engine.callback import Outcome
from fedra_engine.experiment import Experiment
from fedra_engine.exports.model_card import adapter_card, merged_card
from fedra_engine.models.adapters import AdapterLayout, Target
from tests.running import small_config

OUTCOME = Outcome(
    rounds=2,
    frozen={"clean": 0.5, "inverted": 0.25},
    tuned={"clean": 1.0, "inverted": 1.0},
    exported={"clean": 0.75, "inverted": 0.3},
)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    few: dict[str, Any] = {"domains": ["clean", "inverted"], "clients_per_domain": 2}
    return build(small_config(Path("unused"), data=few, clients={"capacities": [12, 3]}))


def with_model(experiment: Experiment, path: str, **others: str) -> Experiment:
    config = experiment.config
    return replace(experiment, config=replace(config, model=replace(config.model, path=path, **others)))


def test_the_front_matter_names_what_the_hub_asks_for(experiment: Experiment) -> None:
    data = ModelCard(adapter_card(with_model(experiment, "owner/model"), OUTCOME)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("owner/model", "peft", "image-classification")
    assert {"lora", "federated-learning", "fedra"} <= set(data.tags)
    assert data.license is None
    assert ModelCard(merged_card(experiment, OUTCOME, range(12), None)).data.library_name == "transformers"


def test_a_folder_is_no_model_of_the_hub(experiment: Experiment) -> None:
    """Which would refuse the card; and where it lies is nobody's business."""
    card = adapter_card(experiment, OUTCOME)
    assert ModelCard(card).data.base_model is None
    assert "| base model | `digits_vit` |" in card


def test_the_figures_are_those_of_what_is_exported(experiment: Experiment) -> None:
    for card in (adapter_card(experiment, OUTCOME), merged_card(experiment, OUTCOME, range(12), None)):
        assert "samples in the test set of each domain" in card
        assert "| accuracy (%) | clean | inverted | average |\n|---|---|---|---|\n" in card
        assert "| before tuning | 50.0 | 25.0 | 37.5 |\n| after | 75.0 | 30.0 | 52.5 |" in card
        assert "52.5 % on average over the domains" in card


def test_a_sub_model_has_no_figures_of_another(experiment: Experiment) -> None:
    card = merged_card(experiment, OUTCOME, [0, 4], 3)
    assert "The sub-model of client 3 " in card
    assert "these, counted from 1: 1, 5." in card
    assert "75.0" not in card


def test_the_facts_are_those_of_the_run(experiment: Experiment) -> None:
    card = adapter_card(experiment, OUTCOME)
    samples = len(experiment.train_data)
    assert f"| data | `digits`: 10 classes, {samples:,} training samples |" in card
    assert "| clients | 4, which hold 3 to 12 blocks |" in card
    assert "| method | `fedra`, 2 rounds |" in card
    assert "| adapters | LoRA of rank 8, scaled by 2, on " in card
    assert " of every block |" in card


def test_adapters_are_described_as_they_are(experiment: Experiment) -> None:
    targets = (Target("q_proj", 64, 64, rank=16, scale=4.0), Target("fc1", 64, 128, rank=4, scale=8.0))
    adapted = np.isin(np.arange(12), [0, 11])
    foundation = replace(experiment.foundation, adapter_layout=AdapterLayout(targets), adapted=adapted)
    card = adapter_card(replace(experiment, foundation=foundation), OUTCOME)
    each = "q_proj (rank 16, scaled by 4), fc1 (rank 4, scaled by 8)"
    assert f"| adapters | LoRA on {each} of these blocks, counted from 1: 1, 12 |" in card


def test_names_stay_in_their_cells(experiment: Experiment) -> None:
    names = ["a|b", "c\nd"]
    outcome = Outcome(1, dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.0))
    card = adapter_card(replace(experiment, domains=names), outcome)
    assert "| domains | a\\|b, c\\nd |" in card
    assert "| accuracy (%) | a\\|b | c\\nd | average |" in card


def test_half_precision_is_said_to_round_elsewhere(experiment: Experiment) -> None:
    assert "in float32 beside bfloat16 weights" in adapter_card(
        with_model(experiment, "digits_vit", dtype="bfloat16"), OUTCOME
    )
    assert "in float32 beside" not in adapter_card(experiment, OUTCOME)


def test_quantized_weights_are_said_to_round_elsewhere(experiment: Experiment) -> None:
    quantized = with_model(experiment, "owner/model", load_in="4bit")
    for card in (adapter_card(quantized, OUTCOME), merged_card(quantized, OUTCOME, range(12), None)):
        assert "weights of the blocks' Linear layers in 4 bits." in card
    assert 'bnb_4bit_quant_type="nf4",' in adapter_card(quantized, OUTCOME)
    assert "bitsandbytes" not in adapter_card(experiment, OUTCOME)

"""The final norm is trained by every client with its head, and by each exit its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedra_engine.config import LoraConfig, ModelConfig
from fedra_engine.execution.evaluation import Evaluator, FisherInformation
from fedra_engine.execution.head_init import initial_heads
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.models.state import EvaluatedModel
from fedra_engine.runtime.errors import InputError
from tests.execution.test_exactness import assert_same_rounds
from tests.tiny import TARGETS, make_samples, make_tiny
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting

NORMS = {"vit": "layernorm", "dinov2": "layernorm", "siglip": "post_layernorm", "llama": "norm", "gpt2_lm": "ln_f"}


def exits(allocation: Allocation) -> Assignment:
    depths = np.where(allocation.sum(axis=1) > 2, 4, 2)
    return Assignment(np.arange(4) < depths[:, None], exits=(1, 3), distillation=0.5)


def setting_of(family: str, training: Any = SGD, **options: Any) -> Setting:
    setting = make_setting(family, replace(training, max_local_steps=2), modules_to_save=[NORMS[family]], **options)
    # As loaded, all scales are 1 and all shifts 0.
    with torch.no_grad():
        for parameter in setting.foundation.norm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    return setting


@pytest.mark.parametrize("family", NORMS)
def test_sweep_equals_sequential_in_float64(family: str) -> None:
    setting = setting_of(family, replace(ADAMW, proximal_mu=0.3), dropout=0.3)
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)
    (found,) = setting.rounds(3)
    assert {name for name in found.after if "norm" in name} >= {"norm.weight"}
    assert not torch.equal(found.after["norm.weight"], found.before["norm.weight"])


def test_each_exit_has_its_own() -> None:
    setting = setting_of("vit")
    setting.exits, setting.assignment = 2, exits
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)
    (found,) = setting.rounds(3)
    assert not torch.equal(found.after["norm.weight"], found.after["exits.0.norm.weight"])


def test_clients_without_adapters_train_it_alone() -> None:
    setting = setting_of("gpt2_lm", layers_to_transform=[0])
    assert_same_rounds(setting, lanes=2, count=1, tolerance=1e-8)


def test_before_training_it_changes_nothing() -> None:
    """Heads made of class means, scores of samples and of blocks are those of the model as it was loaded."""
    trained, samples = setting_of("vit"), make_samples("vit", 30)
    frozen = make_setting("vit", SGD)
    frozen.foundation.model.load_state_dict(trained.foundation.model.state_dict())
    found = []
    for setting in (trained, frozen):
        foundation, state = setting.foundation, setting.state()
        model = SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float64))
        head = initial_heads(ModelConfig(head_init="class_means"), foundation, model, samples, seed=0)
        layout, state = foundation.head_layout, replace(state, heads=head)
        scores = Evaluator(foundation, model, samples, ["only"]).scores(state, EvaluatedModel(np.arange(4)))
        fisher = FisherInformation(foundation, model, samples, seed=0)(state, 8, 0)
        found.append((layout.weight(head), layout.bias(head), torch.from_numpy(fisher), scores["only"].loss))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("family", "name"), [("bert", "embeddings.LayerNorm"), ("gemma3", "norm")])
def test_a_norm_that_the_head_does_not_read_is_refused(family: str, name: str) -> None:
    """So is one that computes with its weight plus one."""
    lora = LoraConfig(target_modules=TARGETS[family], modules_to_save=[name])
    foundation, samples = make_tiny(family, lora, torch.float32), make_samples(family, 3)
    with pytest.raises(InputError, match=r"^lora\.modules_to_save: found .*, whose output is not what the head reads"):
        SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("names", [["layernom"], ["layernorm", "classifier"], ["layernorm_before"]])
def test_other_modules_are_refused(names: list[str]) -> None:
    lora = LoraConfig(target_modules=TARGETS["vit"], modules_to_save=names)
    with pytest.raises(InputError, match=r"^lora\.modules_to_save: found .*, expected one of vit\.layernorm"):
        make_tiny("vit", lora)

"""Every model family: the sweep gives every client the update of its own sub-model, with or without fused blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import make_foundation
from fedra_engine.runtime.errors import InputError
from tests.execution.test_exactness import assert_same_rounds
from tests.tiny import CAUSAL_LMS, CLASSIFIERS, make_samples
from tests.tiny_federation import ADAMW, SGD, make_setting

# test_exactness has these in more ways.
OTHERS = [family for family in CLASSIFIERS if family not in ("vit", "dinov2", "bert")]


@pytest.mark.parametrize("family", OTHERS)
def test_sweep_equals_sequential_in_float64(family: str) -> None:
    training = replace(SGD, max_local_steps=2)
    assert_same_rounds(make_setting(family, training, dropout=0.3), lanes=3, count=2, tolerance=1e-8)


@pytest.mark.parametrize("family", CAUSAL_LMS)
@pytest.mark.parametrize("training", [SGD, replace(ADAMW, proximal_mu=0.3)], ids=["sgd", "adamw"])
def test_sweep_equals_sequential_for_causal_language_models(family: str, training: TrainingConfig) -> None:
    training = replace(training, max_local_steps=2)
    assert_same_rounds(make_setting(family, training, dropout=0.3), lanes=3, count=2, tolerance=1e-8)


def test_a_model_that_goes_on_with_its_logits_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, vocab_size=30, final_logit_softcapping=0.5))
    foundation = make_foundation(model, LoraConfig(target_modules=["q_proj"]), classes=None)
    samples = make_samples("llama_lm", 3)
    with pytest.raises(
        InputError, match=r"model\.path: found a Gemma2ForCausalLM that does not return what its lm_head"
    ):
        SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), torch.device("cpu"), torch.float32))

"""Every model family: the sweep gives every client the update of its own sub-model, with or without fused blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedra_engine.config import TrainingConfig
from tests.execution.test_exactness import assert_same_rounds
from tests.tiny import CAUSAL_LMS, CLASSIFIERS
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

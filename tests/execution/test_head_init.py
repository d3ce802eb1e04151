from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fedra_engine.config import LoraConfig, ModelConfig
from fedra_engine.execution import head_init
from fedra_engine.execution.head_init import class_mean_head, initial_heads
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.task import HeadLayout
from fedra_engine.runtime.errors import InputError
from tests.tiny import CLASSES, TARGETS, TensorSamples, make_samples, make_tiny

CPU = torch.device("cpu")


def built(family: str) -> tuple[Foundation, SweepModel, TensorSamples]:
    foundation = make_tiny(family, LoraConfig(rank=3, target_modules=TARGETS[family]))
    samples = make_samples(family, 60)
    return foundation, SweepModel(foundation, lambda n: samples.inputs(torch.arange(n), CPU, torch.float64)), samples


def logits(layout: HeadLayout, head: Tensor, features: Tensor) -> Tensor:
    return linear(features, layout.weight(head), layout.bias(head))


def test_class_means_predict_the_nearest_one_however_rare_its_class() -> None:
    torch.manual_seed(0)
    centres = 5 * torch.randn(3, 8, dtype=torch.float64) + 20
    labels = torch.tensor([0] * 500 + [1] * 20 + [2] * 3)
    layout = HeadLayout(classes=4, features=8)
    head = class_mean_head(layout, centres[labels] + torch.randn(len(labels), 8), labels)
    points = centres.repeat(100, 1) + torch.randn(300, 8)
    found = logits(layout, head, points)
    means = torch.stack([centres[c] for c in range(3)])
    assert (found[:, :3].argmax(1) == torch.cdist(points, means).argmin(1)).double().mean() > 0.98
    # A class that nobody has is not preferred to the right one.
    assert (found.argmax(1) == torch.arange(3).repeat(100)).all()


def test_without_a_bias_what_all_samples_share_prefers_no_class() -> None:
    torch.manual_seed(0)
    centres = torch.randn(3, 8, dtype=torch.float64) + 20
    labels = torch.arange(3).repeat_interleave(50)
    features = centres[labels] + 0.1 * torch.randn(150, 8)
    layout = HeadLayout(classes=3, features=8, has_bias=False)
    head = class_mean_head(layout, features, labels)
    assert not layout.bias(head).any()
    assert logits(layout, head, centres.mean(0)[None]).abs().max() < 0.05 * logits(layout, head, features).abs().max()
    assert (logits(layout, head, features).argmax(1) == labels).all()


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_class_means_are_those_of_the_frozen_model(family: str) -> None:
    foundation, model, samples = built(family)
    head = initial_heads(ModelConfig(head_init="class_means"), foundation, model, samples, seed=0)
    captured: list[Tensor] = []
    foundation.head.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    with torch.no_grad():
        foundation.model(**samples.inputs(torch.arange(60), CPU, torch.float64))
    features = captured[0]
    if features.dim() == 3:
        features = features[torch.arange(60), samples.tensors["attention_mask"].sum(1) - 1]
    expected = class_mean_head(foundation.head_layout, features, samples.labels)
    assert head.dtype == foundation.adapter_dtype
    torch.testing.assert_close(head[0], expected, rtol=1e-9, atol=1e-9)


def test_class_means_leave_out_samples_whose_features_are_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    foundation, model, samples = built("vit")
    config = ModelConfig(head_init="class_means")
    spoilt = replace(samples, tensors={"pixel_values": samples.tensors["pixel_values"].clone()})
    spoilt.tensors["pixel_values"][7, 0, 0, 0] = torch.nan
    head = initial_heads(config, foundation, model, spoilt, seed=0)
    assert head.isfinite().all()
    assert "leaves out 1 sample" in caplog.text
    spoilt.tensors["pixel_values"][:] = torch.nan
    with pytest.raises(InputError, match=r"^model\.head_init: found no sample with finite features"):
        initial_heads(config, foundation, model, spoilt, seed=0)


def test_class_means_look_at_equally_many_samples_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_init, "SAMPLES_PER_CLASS", 2)
    labels = torch.tensor([0] * 30 + [1] * 5 + [2])
    rows = head_init._balanced_rows(labels.numpy(), 4, seed=0)
    assert torch.bincount(labels[torch.from_numpy(rows)], minlength=4).tolist() == [2, 2, 1, 0]


def test_the_head_starts_as_loaded_or_at_zero() -> None:
    foundation, model, samples = built("vit")
    config = ModelConfig()
    assert torch.equal(initial_heads(config, foundation, model, samples, seed=0), foundation.initial_heads())
    zeros = initial_heads(replace(config, head_init="zeros"), foundation, model, samples, seed=0)
    assert zeros.shape == (1, CLASSES * 17)
    assert not zeros.any()


def test_the_output_layer_of_a_language_model_is_not_made_anew() -> None:
    foundation, model, samples = built("llama_lm")
    with pytest.raises(InputError, match=r"model\.head_init: found zeros with a causal language model"):
        initial_heads(ModelConfig(head_init="zeros"), foundation, model, samples, seed=0)

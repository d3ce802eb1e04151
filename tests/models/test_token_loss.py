from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from fedra_engine.data.samples import NOT_LEARNT
from fedra_engine.execution.banks import loss_scale
from fedra_engine.models import token_loss
from fedra_engine.models.token_loss import token_cross_entropy, token_scores
from tests.tiny import learnt_tokens

CLIENTS = np.array([0, 0, 2, 2, 2, 1])
COUNT = 4
"""The last client has no samples; client 1 has no learnt tokens."""


def batch(bias: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    features = torch.randn(6, 7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (6, 7))
    labels[torch.rand(6, 7) < 0.4] = NOT_LEARNT
    labels[5] = NOT_LEARNT
    weight = torch.randn(11, 4, dtype=torch.float64)
    return features, labels, weight, torch.randn(11, dtype=torch.float64) if bias else None


def expected(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, client: int) -> Tensor:
    mine = torch.from_numpy(client == CLIENTS)
    logits = linear(features[mine], weight, bias)[:, :-1].flatten(0, 1)
    targets = labels[mine][:, 1:].flatten()
    total = cross_entropy(logits, targets, reduction="sum", ignore_index=NOT_LEARNT)
    return total / (targets != NOT_LEARNT).sum().clamp(min=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 40, 10**6], ids=["token by token", "ragged chunks", "at once"])
def test_each_client_gets_the_mean_over_its_learnt_tokens(
    monkeypatch: pytest.MonkeyPatch, chunk: int, bias: bool
) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", chunk)
    features, labels, weight, offset = batch(bias)
    losses = token_cross_entropy(features, labels, learnt_tokens(labels), weight, offset, CLIENTS, COUNT)
    reference = torch.stack([expected(features, labels, weight, offset, client) for client in range(COUNT)])
    torch.testing.assert_close(losses, reference, rtol=1e-12, atol=1e-12)
    factors = torch.tensor([1.0, 2.0, -3.0, 1.0], dtype=torch.float64)
    (found,) = torch.autograd.grad((losses * factors).sum(), features)
    (gradient,) = torch.autograd.grad((reference * factors).sum(), features)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_logits_of_all_tokens_never_exist_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", 40)
    sizes = []
    plain = token_loss._logits
    monkeypatch.setattr(token_loss, "_logits", lambda *arguments: sizes.append((y := plain(*arguments)).numel()) or y)
    features, labels, weight, bias = batch()
    token_cross_entropy(features, labels, learnt_tokens(labels), weight, bias, CLIENTS, COUNT).sum().backward()
    assert len(sizes) > 1
    assert max(sizes) <= 40


def test_low_precision_features_have_a_loss_in_float32() -> None:
    features, labels, weight, bias = batch()
    exact = token_cross_entropy(features, labels, learnt_tokens(labels), weight, bias, CLIENTS, COUNT)
    low = features.detach().bfloat16().requires_grad_()
    assert bias is not None
    losses = token_cross_entropy(low, labels, learnt_tokens(labels), weight.bfloat16(), bias.bfloat16(), CLIENTS, COUNT)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact.float(), rtol=2e-2, atol=2e-2)
    losses.sum().backward()
    (gradient,) = torch.autograd.grad(exact.sum(), features)
    assert low.grad is not None
    assert (low.grad.double() - gradient).abs().max() <= 3e-2 * gradient.abs().max()


def test_a_tokens_share_of_a_long_text_is_not_too_small_for_float16() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(4, 1001, 8, dtype=torch.float64), 0.1 * torch.randn(2000, 8, dtype=torch.float64)
    labels, clients = torch.randint(0, 2000, (4, 1001)), np.zeros(4, dtype=np.int64)

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = features.to(dtype, copy=True).requires_grad_()
        (
            token_cross_entropy(leaf, labels, learnt_tokens(labels), weight.to(dtype), None, clients, 1).sum()
            * loss_scale(dtype)
        ).backward()
        assert leaf.grad is not None
        return leaf.grad.double() / loss_scale(dtype)

    exact = gradient(torch.float64)
    assert (gradient(torch.float16) - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("chunk", [40, 10**6])
def test_scores_count_right_predictions_per_sample(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", chunk)
    features, labels, weight, bias = batch()
    logits = linear(features.detach(), weight, bias)[:, :-1]
    targets = labels[:, 1:]
    correct, tokens, undefined, losses = token_scores(features, labels, learnt_tokens(labels), weight, bias).T
    assert torch.equal(tokens, (targets != NOT_LEARNT).sum(1).double())
    assert torch.equal(correct, (logits.argmax(2) == targets).sum(1).double())
    assert not undefined.any()
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_LEARNT, reduction="none")
    torch.testing.assert_close(losses, each.view_as(targets).sum(1).double())
    features.data[1] = torch.nan
    spoilt, _, missing, rest = token_scores(features, labels, learnt_tokens(labels), weight, bias).T
    assert torch.equal(missing, tokens.where(torch.arange(len(labels)) == 1, 0))
    assert torch.equal(spoilt, correct.where(torch.arange(len(labels)) != 1, 0))
    assert torch.equal(rest, losses.where(torch.arange(len(labels)) != 1, 0))


def test_a_batch_without_learnt_tokens_has_loss_zero() -> None:
    features, labels, weight, bias = batch()
    labels = torch.full_like(labels, NOT_LEARNT)
    losses = token_cross_entropy(features, labels, learnt_tokens(labels), weight, bias, CLIENTS, COUNT)
    losses.sum().backward()
    assert features.grad is not None
    assert not losses.any()
    assert not features.grad.any()
    assert not token_scores(features, labels, learnt_tokens(labels), weight, bias).any()

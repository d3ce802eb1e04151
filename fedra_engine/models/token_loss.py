"""The loss of causal language models whose output layer is frozen and shared by all clients.

Logits of all tokens at once would need more memory than the model. So tokens pass the output layer in chunks, and since
it is frozen, the gradient of a chunk is computed at once and its logits are discarded (as in Liger-Kernel's fused
linear cross entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedra_engine.data.samples import LearntTokens
from fedra_kernels import to_device

Watch = Callable[[Tensor, Tensor, Tensor], None]
"""Gets logits [predictions, classes] and labels [predictions] of predictions, and the sample of each in its batch."""

CHUNK_LOGITS = 2**26
"""Maximum number of logits in a chunk."""


def token_cross_entropy(
    features: Tensor,
    labels: Tensor,
    learnt: LearntTokens,
    weight: Tensor,
    bias: Tensor | None,
    clients: NDArray[np.int64],
    count: int,
) -> Tensor:
    """Mean cross entropy of each client's learnt tokens, [count], in at least float32; 0 for a client without any.

    Args:
        features: [samples, tokens, features], inputs of the output layer, differentiable; those at position t predict
            token t + 1.
        labels: int64 [samples, tokens], the tokens themselves.
        learnt: the tokens that have a loss.
        weight, bias: of the output layer, [vocabulary, features] and [vocabulary] or None; frozen.
        clients: int64 [samples], each sample's client, on the host.
        count: number of clients.
    """
    owners = clients[learnt.samples]
    wide = np.dtype(np.float64 if features.dtype == torch.float64 else np.float32)
    of_each = np.bincount(owners, minlength=count).astype(wide)
    shares = np.reciprocal(of_each[owners])
    rows, *of_tokens = to_device([_rows(features, learnt), owners, shares], features.device)
    losses: Tensor = _TokenCrossEntropy.apply(*_learnt(features, labels, rows), *of_tokens, weight, bias, count)
    return losses


@torch.no_grad()
def token_scores(
    features: Tensor,
    labels: Tensor,
    learnt: LearntTokens,
    weight: Tensor,
    bias: Tensor | None,
    watch: Watch | None = None,
) -> Tensor:
    """`Task.scores` of the learnt tokens, float64 [samples, 4]; other arguments as in `token_cross_entropy`."""
    rows, samples = to_device([_rows(features, learnt), learnt.samples], features.device)
    before, targets = _learnt(features, labels, rows)
    scores = torch.zeros(4, len(features), dtype=torch.float64, device=features.device)
    correct, tokens, undefined, losses = scores
    for chunk in _chunks(len(rows), weight):
        logits = _logits(before[chunk], weight, bias)
        if watch is not None:
            watch(logits, targets[chunk], samples[chunk])
        found = prediction_scores(logits, targets[chunk])
        for total, of_row in zip((correct, undefined, losses), found, strict=True):
            total.index_add_(0, samples[chunk], of_row)
    tokens.index_add_(0, samples, torch.ones(len(samples), dtype=torch.float64, device=features.device))
    return scores.T


def prediction_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of `logits` [rows, classes] for `targets` [rows]: correct, undefined and cross entropy, float64 [rows].

    A prediction is undefined, and its cross entropy 0, if the largest logit is NaN or infinite.
    """
    predicted, defined = predicted_classes(logits)
    losses = F.cross_entropy(logits, targets, reduction="none").where(defined, 0)
    return ((predicted == targets) & defined).double(), (~defined).double(), losses.double()


def predicted_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class of the largest logit, int64 [rows], and whether that logit is finite, bool [rows]."""
    predicted = logits.argmax(1)
    return predicted, logits.gather(1, predicted[:, None])[:, 0].isfinite()


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        before: Tensor,
        targets: Tensor,
        owners: Tensor,
        shares: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        count: int,
    ) -> Tensor:
        losses = torch.zeros(count, dtype=shares.dtype, device=before.device)
        gradient = torch.empty_like(before)
        for chunk in _chunks(len(before), weight):
            target = targets[chunk, None]
            log_p = F.log_softmax(_logits(before[chunk], weight, bias), dim=1)
            of_target = log_p.gather(1, target)
            losses.index_add_(0, owners[chunk], -of_target[:, 0] * shares[chunk])
            # d nll / d logits = softmax − one-hot.
            slope = torch.exp(log_p, out=torch.empty_like(log_p, dtype=weight.dtype))
            slope.scatter_(1, target, torch.expm1(of_target).to(slope.dtype))
            torch.mm(slope, weight, out=gradient[chunk])
        ctx.save_for_backward(gradient, shares, owners)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        gradient, shares, owners = ctx.saved_tensors
        # Multiplied first: a token's share alone may be too small for float16.
        factors = (grad_losses[owners] * shares).to(gradient.dtype)
        return gradient * factors[:, None], *([None] * 6)


def _rows(features: Tensor, learnt: LearntTokens) -> NDArray[np.int64]:
    """Rows of the flattened features [samples · tokens, …] that predict the learnt tokens, int64 [learnt]."""
    return learnt.samples * features.shape[1] + learnt.positions - 1


def _learnt(features: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Features that predict the learnt tokens, [learnt, features], and these tokens, [learnt]."""
    return features.flatten(0, 1).index_select(0, rows), labels.flatten().index_select(0, rows + 1)


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // len(weight))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight, bias).to(torch.promote_types(rows.dtype, torch.float32))

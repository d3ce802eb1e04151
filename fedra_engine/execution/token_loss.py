"""The loss of causal language models whose output layer is frozen and shared by all clients.

The vocabulary is large: logits of all tokens of all clients at once would need more memory than the model. So the
tokens meet the output layer in chunks, and since it is frozen, a chunk's gradient is taken at once and its logits are
forgotten (as Liger-Kernel's fused linear cross entropy does it, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedra_engine.data.token_samples import NOT_LEARNT

CHUNK_LOGITS = 2**26
"""Most logits that exist at a time."""


class TokenScores(NamedTuple):
    """How many of each sample's learnt tokens are predicted right, and how many there are; int64 [samples]."""

    correct: Tensor
    tokens: Tensor


def token_cross_entropy(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, clients: Tensor, count: int
) -> Tensor:
    """Mean cross entropy of each client's learnt tokens, [count], in at least float32.

    The features at a token predict the next one. A client without a learnt token has loss 0.

    Args:
        features: [samples, tokens, features] before the output layer; the result is differentiable in them.
        labels: int64 [samples, tokens], the tokens themselves, or -100 where one is not to be learnt.
        weight, bias: of the output layer, [vocabulary, features] and [vocabulary] or None; frozen.
        clients: int64 [samples], which client has each sample.
        count: number of clients.
    """
    losses: Tensor = _TokenCrossEntropy.apply(features, labels, weight, bias, clients, count)
    return losses


@torch.no_grad()
def token_scores(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> TokenScores:
    """How well the next tokens are predicted; arguments as in `token_cross_entropy`."""
    rows, samples, targets = _learnt(features, labels)
    scores = torch.zeros(2, len(features), dtype=torch.int64, device=features.device)
    correct, tokens = scores
    for chunk in _chunks(len(rows), weight):
        right = _logits(rows[chunk], weight, bias).argmax(1) == targets[chunk]
        correct.index_add_(0, samples[chunk], right.long())
    tokens.index_add_(0, samples, torch.ones_like(samples))
    return TokenScores(correct, tokens)


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        clients: Tensor,
        count: int,
    ) -> Tensor:
        rows, samples, targets = _learnt(features, labels)
        owners = clients[samples]
        wide = torch.promote_types(features.dtype, torch.float32)
        tokens = torch.bincount(owners, minlength=count).to(wide)
        shares = (1 / tokens)[owners]
        losses = torch.zeros(count, dtype=wide, device=features.device)
        gradient = torch.empty_like(rows)
        for chunk in _chunks(len(rows), weight):
            logits = _logits(rows[chunk], weight, bias)
            target = targets[chunk, None]
            log_sums = logits.logsumexp(1, keepdim=True)
            nll = (log_sums - logits.gather(1, target))[:, 0]
            losses.index_add_(0, owners[chunk], nll * shares[chunk])
            # d nll / d logits = softmax − one-hot, in the place of the logits.
            slope = logits.sub_(log_sums).exp_()
            slope.scatter_add_(1, target, torch.full_like(nll, -1)[:, None])
            torch.mm(slope.to(weight.dtype), weight, out=gradient[chunk])
        ctx.save_for_backward(gradient, shares, owners, labels)
        ctx.shape = features.shape
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        gradient, shares, owners, labels = ctx.saved_tensors
        grad_features = gradient.new_zeros(ctx.shape)
        # One factor, not two: a token's share alone may be too small for float16.
        factors = (grad_losses[owners] * shares).to(gradient.dtype)
        # Only where the next token is learnt.
        grad_features[:, :-1][labels[:, 1:] != NOT_LEARNT] = gradient * factors[:, None]
        return grad_features, *([None] * 5)


def _learnt(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features before each learnt token [learnt, features], the sample each is of, and the tokens, [learnt]."""
    samples, positions = torch.nonzero(labels[:, 1:] != NOT_LEARNT, as_tuple=True)
    return features[samples, positions], samples, labels[samples, positions + 1]


def _chunks(rows: int, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // len(weight))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight, bias).to(torch.promote_types(rows.dtype, torch.float32))

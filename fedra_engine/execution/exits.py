"""The loss of clients with several classifiers: cross entropy at each, and mutual distillation between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


@dataclass(frozen=True)
class ExitTable:
    """Where the samples of a batch stand at each exit.

    Attributes:
        rows: int64 [samples, exits], the sample's row of the logits at each of its client's exits; 0 where none.
        present: bool [samples, exits], whether the client has that exit.
        clients: int64 [samples], position of the sample's client in the batch.
        shares: float [samples], one over the number of samples of its client.
    """

    rows: Tensor
    present: Tensor
    clients: Tensor
    shares: Tensor


def exit_losses(logits: Tensor, labels: Tensor, table: ExitTable, count: int, distillation: float) -> Tensor:
    """The loss of each client, [count]: Σ over its exits of cross entropy, plus mutual distillation.

    DepthFL (Kim et al., ICLR 2023): with m exits, λ / (m − 1) Σ_i Σ_{j ≠ i} KL(p_j ‖ p_i), where p_j, the
    teacher, gets no gradient. All means are over the client's samples.

    Args:
        logits: [rows, classes] of all samples at all exits.
        labels: int64 [rows].
        table: how rows belong together.
        count: number of clients.
        distillation: λ.
    """
    # The row that stands for an absent exit is another client's: even times zero, a NaN of that one would be one here.
    here = table.present
    present = here.to(logits.dtype)
    entropies = cross_entropy(logits, labels, reduction="none")[table.rows]
    total = entropies.where(here, 0).sum(1)
    if distillation > 0:
        log_p = log_softmax(logits, dim=1)[table.rows].where(here[:, :, None], 0)
        p = log_p.detach().exp()
        # KL(p_j ‖ p_i) = Σ p_j log p_j − Σ p_j log p_i, for student i and teacher j.
        cross = torch.einsum("sic,sjc->sij", log_p, p)
        divergence = (p * log_p.detach()).sum(2)[:, None, :] - cross
        pairs = present[:, :, None] * present[:, None, :]
        others = (present.sum(1) - 1).clamp(min=1)
        # The diagonal is KL(p_i ‖ p_i), of value zero but not of gradient zero.
        pairs = pairs * (1 - torch.eye(pairs.shape[1], dtype=pairs.dtype, device=pairs.device))
        total = total + distillation * (divergence * pairs).sum((1, 2)) / others
    return logits.new_zeros(count).index_add(0, table.clients, total * table.shares)

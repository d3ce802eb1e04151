"""The sequential executor: each client's real sub-model, built with PEFT, trained alone. The oracle of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.submodel import Submodel, build_submodel
from fedra_engine.execution.work import ClientUpdates, LocalLoss, LocalWork
from fedra_engine.federation.allocation import Allocation
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState


class SequentialExecutor:
    """Trains one client after another with torch's own optimizers and PEFT's own LoRA layers."""

    def __init__(self, foundation: Foundation, samples: Samples, lora: LoraConfig) -> None:
        self._foundation = foundation
        self._samples = samples
        self._lora = lora

    def train(self, work: LocalWork, allocation: Allocation, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the round; see `Executor.train`."""
        for row, client in enumerate(work.participants.tolist()):
            blocks = np.flatnonzero(allocation[row])
            submodel = build_submodel(self._foundation, self._lora, blocks, state)

            def before_step(step: int, client: int = client, submodel: Submodel = submodel) -> None:
                if self._lora.dropout > 0:
                    submodel.use_dropout_keys(
                        DropoutKeys(
                            self._lora.dropout, seed=work.seed, round=work.round, clients=[client], steps=[step]
                        )
                    )

            loss = train_client(
                submodel.model, submodel.parameters(), self._samples, work, client, before_step=before_step
            )
            adapters, head = submodel.pack(len(blocks), self._foundation.head_layout)
            yield ClientUpdates.of_one(client, blocks, adapters, head, work, loss)


def train_client(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    work: LocalWork,
    client: int,
    *,
    before_step: Callable[[int], None] | None = None,
) -> LocalLoss:
    """Train `parameters` of a client's own model on its batches, with torch's optimizer.

    `before_step` is called with the number of each local step, from 0.
    """
    optimizer = _make_optimizer(parameters, work.training, work.lr)
    device, dtype = parameters[0].device, next(model.parameters()).dtype
    total, processed = 0.0, 0
    for step, batch in enumerate(work.batches(client)):
        if before_step is not None:
            before_step(step)
        rows = torch.from_numpy(batch)
        loss = cross_entropy(model(**samples.inputs(rows, device, dtype)).logits, samples.labels[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if work.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, work.training.clip_norm)
        optimizer.step()
        total += float(loss.detach()) * len(batch)
        processed += len(batch)
    return LocalLoss(total, processed)


def _make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)

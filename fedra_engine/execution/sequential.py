"""The sequential executor: each client's real sub-model, built with PEFT and trained alone. The oracle of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.submodel import Submodel, build_submodel
from fedra_engine.execution.work import ClientUpdates, LocalWork
from fedra_engine.federation.allocation import Allocation
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState


class SequentialExecutor:
    """Trains one client after another with torch's own optimizers and PEFT's own LoRA layers."""

    def __init__(self, foundation: Foundation, store: Samples, lora: LoraConfig) -> None:
        self._foundation = foundation
        self._store = store
        self._lora = lora

    def train(self, work: LocalWork, allocation: Allocation, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the round; see `Executor.train`."""
        for row, client in enumerate(work.participants.tolist()):
            blocks = np.flatnonzero(allocation[row])
            submodel = build_submodel(self._foundation, self._lora, blocks, state)
            loss_sum, processed = self._train_client(submodel, work, client)
            adapters, head = submodel.pack(len(blocks))
            yield ClientUpdates(
                clients=np.array([client]),
                samples=work.clients.sample_counts(np.array([client])),
                processed=np.array([processed]),
                losses=np.array([loss_sum / processed]),
                adapters=adapters,
                slots=torch.arange(len(blocks), device=adapters.device),
                slot_owners=np.zeros(len(blocks), dtype=np.int64),
                slot_blocks=blocks,
                heads=head[None],
                head_rows=torch.zeros(1, dtype=torch.int64, device=head.device),
            )

    def _train_client(self, submodel: Submodel, work: LocalWork, client: int) -> tuple[float, int]:
        """Returns the sum over samples of the training loss, and the samples gone through."""
        parameters = submodel.parameters()
        optimizer = make_optimizer(parameters, work.training, work.lr)
        device = submodel.head.weight.device
        loss_sum, processed = 0.0, 0
        for step, batch in enumerate(work.batches(client)):
            rows = torch.from_numpy(batch)
            if self._lora.dropout > 0:
                submodel.use_dropout_keys(
                    DropoutKeys(self._lora.dropout, seed=work.seed, round=work.round, clients=[client], steps=[step])
                )
            inputs = self._store.inputs(rows, device, self._foundation.dtype)
            loss = cross_entropy(submodel.model(**inputs).logits, self._store.labels[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if work.training.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, work.training.clip_norm)
            optimizer.step()
            loss_sum += float(loss.detach()) * len(batch)
            processed += len(batch)
        return loss_sum, processed


def make_optimizer(parameters: list[nn.Parameter], training: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    """torch's optimizer for `training`."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)

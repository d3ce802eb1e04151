"""The sequential executor: each client's real sub-model, built with PEFT, trained alone. The oracle of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.execution.banks import clip_factors, loss_scale
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.submodel import Submodel
from fedra_engine.federation.assignment import Assignment, ClientAlone, LocalTerm, training_terms
from fedra_engine.federation.work import ClientUpdates, LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.randomness import SampleDraws

Logits = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""The logits [samples, classes] of a client's model at each of its exits."""


@dataclass
class SequentialExecutor:
    """Trains one client after another with torch's own optimizers and PEFT's own LoRA layers."""

    foundation: Foundation
    samples: Samples
    lora: LoraConfig
    lanes: int = field(default=1, init=False)

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the participants in the order of `work`, each from `state`; the updates of one client at a time."""
        self.foundation.use_base(state.base)
        for row, client in enumerate(work.participants.tolist()):
            submodel = Submodel(self.foundation, self.lora, assignment, row, client, state)

            def before_step(step: int, client: int = client, submodel: Submodel = submodel) -> None:
                if self.lora.dropout > 0:
                    submodel.use_dropout_keys(
                        DropoutKeys(self.lora.dropout, seed=work.seed, round=work.round, clients=[client], steps=[step])
                    )

            loss = train_client(
                submodel.logits,
                submodel.parameters(),
                self.samples,
                work,
                client,
                self.foundation,
                distillation=assignment.distillation,
                factors=submodel.factors(),
                terms=assignment.terms,
                before_step=before_step,
            )
            update = submodel.update()
            starts = state.adapters[torch.from_numpy(update.blocks).to(self.foundation.device)]
            assignment.make_own(row, client, update.blocks, starts, self.foundation.adapter_layout)
            head_starts = state.heads[torch.from_numpy(update.exits).to(self.foundation.device)]
            yield ClientUpdates.of_one(client, update, work, *loss).checked(starts, head_starts)


def train_client(
    logits: Logits,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    work: LocalWork,
    client: int,
    foundation: Foundation,
    *,
    distillation: float = 0.0,
    factors: Sequence[tuple[Tensor, Tensor]] = (),
    terms: Sequence[LocalTerm] = (),
    before_step: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Train `parameters` of a client's own model on its batches, with torch's optimizer.

    Args:
        logits: the model.
        parameters: what is trained.
        samples: the training set.
        work: batches and hyperparameters.
        client: who trains.
        foundation: what the model was made of.
        distillation: weight of the mutual distillation between exits.
        factors: A and B of each adapter that the client holds, for local terms.
        terms: what the method adds to the loss.
        before_step: called with the number of each local step, from 0.
    """
    optimizer = _make_optimizer(parameters, work.training, work.lr)
    terms = (*terms, *training_terms(work.training))
    own = ClientAlone(parameters, [parameter.detach().clone() for parameter in parameters if terms], factors)
    device, dtype, scale = foundation.device, foundation.dtype, loss_scale(foundation.dtype)
    total, processed = 0.0, 0
    for step, drawn in enumerate(work.batches(client)):
        if before_step is not None:
            before_step(step)
        draws = SampleDraws(work.seed, work.round, [client], [step], [len(drawn)])
        batch = samples.batch(torch.from_numpy(drawn), device, dtype, draws)
        at_exits = logits(batch.inputs)
        loss = foundation.task.loss_alone(at_exits, batch.labels, distillation)
        optimizer.zero_grad(set_to_none=True)
        (torch.stack([loss, *(term.loss(own) for term in terms)]).sum() * scale).backward()
        if scale != 1:
            for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
                gradient /= scale
        _clip_gradients(parameters, work.training)
        optimizer.step()
        total += float(loss.detach()) * len(drawn)
        processed += len(drawn)
    return total, processed


def _clip_gradients(parameters: Sequence[nn.Parameter], training: TrainingConfig) -> None:
    """Multiply all gradients by the one factor of `clip_factors`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    factor = clip_factors(norms.square().sum(), training, parameters[0].dtype)
    for gradient in gradients:
        gradient *= factor


def _make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)

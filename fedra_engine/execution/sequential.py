"""The sequential executor: each client's real sub-model, built with PEFT, trained alone. The oracle of all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Samples
from fedra_engine.data.token_samples import NOT_LEARNT
from fedra_engine.execution.banks import clip_factors
from fedra_engine.execution.dropout import DropoutKeys
from fedra_engine.execution.loss_scale import loss_scale
from fedra_engine.execution.submodel import Submodel, build_submodel
from fedra_engine.federation.assignment import Assignment, ClientAlone, LocalTerm, training_terms
from fedra_engine.federation.work import ClientUpdates, LocalLoss, LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.randomness import SampleDraws

Logits = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""The logits [samples, classes] of a client's model at each of its exits."""


class SequentialExecutor:
    """Trains one client after another with torch's own optimizers and PEFT's own LoRA layers."""

    def __init__(self, foundation: Foundation, samples: Samples, lora: LoraConfig) -> None:
        self._foundation = foundation
        self._samples = samples
        self._lora = lora
        self.lanes = 1

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Train the round; see `Executor.train`."""
        self._foundation.use_base(state.base)
        for row, client in enumerate(work.participants.tolist()):
            submodel = build_submodel(self._foundation, self._lora, assignment, row, client, state)

            def before_step(step: int, client: int = client, submodel: Submodel = submodel) -> None:
                if self._lora.dropout > 0:
                    submodel.use_dropout_keys(
                        DropoutKeys(
                            self._lora.dropout, seed=work.seed, round=work.round, clients=[client], steps=[step]
                        )
                    )

            loss = train_client(
                submodel.logits,
                submodel.parameters(),
                self._samples,
                work,
                client,
                dtype=self._foundation.dtype,
                distillation=assignment.distillation,
                factors=submodel.factors(),
                terms=assignment.terms,
                before_step=before_step,
            )
            update = submodel.update()
            starts = state.adapters[torch.from_numpy(update.blocks).to(state.adapters.device)]
            assignment.make_own(row, client, update.blocks, starts, self._foundation.adapter_layout)
            head_starts = state.heads[torch.from_numpy(update.exits).to(state.heads.device)]
            yield ClientUpdates.of_one(client, update, work, loss).checked(starts, head_starts)


def train_client(
    logits: Logits,
    parameters: Sequence[nn.Parameter],
    samples: Samples,
    work: LocalWork,
    client: int,
    *,
    dtype: torch.dtype,
    distillation: float = 0.0,
    factors: Sequence[tuple[Tensor, Tensor]] = (),
    terms: Sequence[LocalTerm] = (),
    before_step: Callable[[int], None] | None = None,
) -> LocalLoss:
    """Train `parameters` of a client's own model on its batches, with torch's optimizer.

    Args:
        logits: the model.
        parameters: what is trained.
        samples: the training set.
        work: batches and hyperparameters.
        client: who trains.
        dtype: precision of the model's inputs.
        distillation: weight of the mutual distillation between exits.
        factors: A and B of each adapter that the client holds, for local terms.
        terms: what the method adds to the loss.
        before_step: called with the number of each local step, from 0.
    """
    optimizer = _make_optimizer(parameters, work.training, work.lr)
    terms = (*terms, *training_terms(work.training))
    own = ClientAlone(parameters, [parameter.detach().clone() for parameter in parameters if terms], factors)
    device = parameters[0].device
    total, processed = 0.0, 0
    for step, drawn in enumerate(work.batches(client)):
        if before_step is not None:
            before_step(step)
        draws = SampleDraws(work.seed, work.round, [client], [step], [len(drawn)])
        batch = samples.batch(torch.from_numpy(drawn), device, dtype, draws)
        at_exits = logits(batch.inputs)
        loss = _loss(at_exits, batch.labels, distillation)
        optimizer.zero_grad(set_to_none=True)
        scale = loss_scale(dtype)
        (torch.stack([loss, *(term.loss(own) for term in terms)]).sum() * scale).backward()
        if scale != 1:
            for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
                gradient /= scale
        _clip_gradients(parameters, work.training)
        optimizer.step()
        total += float(loss.detach()) * len(drawn)
        processed += len(drawn)
    return LocalLoss(total, processed)


def _clip_gradients(parameters: Sequence[nn.Parameter], training: TrainingConfig) -> None:
    """Multiply all gradients by the one factor of `clip_factors`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
    factor = clip_factors(norms.square().sum(), training, parameters[0].dtype)
    for gradient in gradients:
        gradient *= factor


def _loss(at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
    """Cross entropy at every exit, and every exit as the teacher of every other one; see `exit_losses`.

    Of a causal language model, that of the next tokens; see `token_cross_entropy`.
    """
    if labels.dim() == 2:
        (logits,) = at_exits
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, 1:].flatten()
        learnt = (targets != NOT_LEARNT).sum().clamp(min=1)
        return cross_entropy(wide, targets, ignore_index=NOT_LEARNT, reduction="sum") / learnt
    loss = torch.stack([cross_entropy(logits, labels) for logits in at_exits]).sum()
    for student in at_exits:
        for teacher in at_exits:
            if teacher is not student:
                target = log_softmax(teacher.detach(), dim=1)
                divergence = kl_div(log_softmax(student, dim=1), target, reduction="batchmean", log_target=True)
                loss = loss + distillation / (len(at_exits) - 1) * divergence
    return loss


def _make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingConfig, lr: float) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(parameters, lr, betas=training.betas, eps=training.eps, weight_decay=training.weight_decay)

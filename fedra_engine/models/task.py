"""What a model is for: the head that makes its logits, the loss it is trained by, and what counts as right.

A classifier's head is trained, one for each client. The output layer of a causal language model stays as it is, and
all clients share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from fedra_engine.data.samples import NOT_LEARNT, Batch
from fedra_engine.models.sharding import gathered
from fedra_engine.models.token_loss import prediction_scores, token_cross_entropy, token_scores
from fedra_kernels import RowGroups, head_cross_entropy, head_logits

_TRIAL_TOKENS = 8
"""Of a text that a language model is tried on: logits are large."""


@dataclass(frozen=True)
class HeadLayout:
    """Where the weight [classes, features] and bias [classes] of a classifier lie in a vector of `size`.

    A classifier without a bias has room for one too, for the ops take one; it is zero and is not trained.
    """

    classes: int
    features: int
    has_bias: bool = True

    @property
    def size(self) -> int:
        """Parameters of one head."""
        return self.classes * (self.features + 1)

    @property
    def trained_size(self) -> int:
        """Parameters of one head that are trained, which come first."""
        return self.size if self.has_bias else self.classes * self.features

    def weight(self, heads: Tensor) -> Tensor:
        """View […, classes, features] of heads […, size]."""
        return heads[..., : self.classes * self.features].unflatten(-1, (self.classes, self.features))

    def bias(self, heads: Tensor) -> Tensor:
        """View […, classes] of heads […, size]."""
        return heads[..., self.classes * self.features :]

    def pack(self, linear: nn.Linear) -> Tensor:
        """The first `classes` outputs of `linear` as a new vector [size]; a missing bias is zero."""
        weight = linear.weight.detach()[: self.classes]
        bias = weight.new_zeros(self.classes) if linear.bias is None else linear.bias.detach()[: self.classes]
        return torch.cat([weight.flatten(), bias])

    def load(self, head: Tensor, linear: nn.Linear) -> None:
        """Copy `head` [size] into the parameters of `linear`."""
        linear.weight.data.copy_(self.weight(head))
        if self.has_bias:
            linear.bias.data.copy_(self.bias(head))


@dataclass(frozen=True)
class ExitTable:
    """Where the samples of a batch stand at each exit.

    Attributes:
        count: number of clients.
        distillation: weight λ of the mutual distillation between a client's exits.
        rows: int64 [samples, exits], the sample's row of the logits at each of its client's exits; 0 where none.
        present: bool [samples, exits], whether the client has that exit.
        clients: int64 [samples], position of the sample's client in the batch.
        shares: float [samples], one over the number of samples of its client.
    """

    count: int
    distillation: float
    rows: Tensor
    present: Tensor
    clients: Tensor
    shares: Tensor


@dataclass(frozen=True)
class PassHeads:
    """The heads of the clients in a pass.

    Attributes:
        parameters, gradients: banks [rows, head size].
        groups: samples of the pass by head, the slots being rows of the banks; by client if there are no `exits`.
        exits: how groups at several exits belong together; None where every client has one head.
    """

    parameters: Tensor
    gradients: Tensor
    groups: RowGroups
    exits: ExitTable | None


class Task(ABC):
    """What distinguishes a classifier from a causal language model.

    Attributes:
        head: the Linear that makes the logits, as loaded.
        layout: of what clients train of it: a classifier, or nothing (`size` 0) of an output layer.
        auto_class: how transformers' auto classes for this task are called, of models that take text.
    """

    auto_class: str

    def __init__(self, head: nn.Linear, layout: HeadLayout) -> None:
        self.head = head
        self.layout = layout

    @property
    def trains_head(self) -> bool:
        """Whether clients train the head, each its own."""
        return self.layout.size > 0

    @abstractmethod
    def losses(self, features: Tensor, batch: Batch, heads: PassHeads) -> Tensor:
        """The loss of each client of a pass, [clients]; its backward adds the gradients of the `heads` to theirs.

        `features` are the inputs of the heads for all samples of the `batch`.
        """

    @abstractmethod
    def loss_alone(self, at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
        """The loss of a client that trains alone, from its logits [samples, …] at each exit, in torch's own words."""

    @abstractmethod
    def scores(self, features: Tensor, batch: Batch, heads: Sequence[Tensor]) -> Tensor:
        """How well samples are predicted, float64 [samples, 4].

        Of each sample: how many classes or learnt tokens are predicted correctly, of how many (1 for a classifier), how
        many have no prediction, because logits are not finite, and the sum of the cross entropies of the rest.

        Args:
            features: inputs of the head for all samples of the `batch`, as many times as there are `heads`.
            batch: these samples.
            heads: classifiers [head size] whose logits are averaged, each of its part of the features.
        """

    @abstractmethod
    def make_head(self, values: Tensor) -> nn.Linear:
        """The head of a client's own model, which holds `values` [head size]."""

    def whole_head(self) -> AbstractContextManager[None]:
        """Where weights are sharded, all processes enter this for each pass that has a loss or scores."""
        return nullcontext()

    def shortened(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As much of `inputs` as it takes to try a model."""
        return inputs


class Classification(Task):
    """Images or texts have one label each, and clients train classifiers."""

    auto_class = "SequenceClassification"

    def losses(self, features: Tensor, batch: Batch, heads: PassHeads) -> Tensor:
        layout, features = self.layout, features.to(heads.parameters.dtype)
        weight, bias = layout.weight(heads.parameters), layout.bias(heads.parameters)
        sinks = layout.weight(heads.gradients), layout.bias(heads.gradients)
        if heads.exits is None:
            losses, _ = head_cross_entropy(features, weight, bias, batch.labels, heads.groups, *sinks)
            return losses
        return exit_losses(head_logits(features, weight, bias, heads.groups, *sinks), batch.labels, heads.exits)

    def loss_alone(self, at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
        # Every exit is the teacher of every other one; see `exit_losses`.
        loss = torch.stack([cross_entropy(logits, labels) for logits in at_exits]).sum()
        for student in at_exits:
            for teacher in at_exits:
                if teacher is not student:
                    target = log_softmax(teacher.detach(), dim=1)
                    divergence = kl_div(log_softmax(student, dim=1), target, reduction="batchmean", log_target=True)
                    loss = loss + distillation / (len(at_exits) - 1) * divergence
        return loss

    def scores(self, features: Tensor, batch: Batch, heads: Sequence[Tensor]) -> Tensor:
        parts, layout = features.to(heads[0].dtype).chunk(len(heads)), self.layout
        pairs = zip(parts, heads, strict=True)
        logits = torch.stack([linear(part, layout.weight(head), layout.bias(head)) for part, head in pairs])
        scores = prediction_scores(logits.mean(0), batch.labels[: len(parts[0])])
        return torch.stack([scores[0], torch.ones_like(scores[0]), *scores[1:]], dim=1)

    def make_head(self, values: Tensor) -> nn.Linear:
        layout = self.layout
        head = nn.Linear(layout.features, layout.classes, layout.has_bias, device=values.device, dtype=values.dtype)
        layout.load(values, head)
        # A low-precision model hands its features to a head kept in full precision.
        head.register_forward_pre_hook(lambda module, args: (args[0].to(values.dtype),))
        return head


class CausalLM(Task):
    """Texts whose next tokens are to be predicted, by an output layer that is frozen and shared."""

    auto_class = "CausalLM"

    def losses(self, features: Tensor, batch: Batch, heads: PassHeads) -> Tensor:
        sizes = heads.groups.sizes
        owners = np.repeat(np.arange(len(sizes)), sizes)
        assert batch.learnt is not None
        with self.whole_head():
            output = self.head.weight, self.head.bias
            return token_cross_entropy(features, batch.labels, batch.learnt, *output, owners, len(sizes))

    def loss_alone(self, at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
        (logits,) = at_exits
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, 1:].flatten()
        learnt = (targets != NOT_LEARNT).sum().clamp(min=1)
        return cross_entropy(wide, targets, ignore_index=NOT_LEARNT, reduction="sum") / learnt

    def scores(self, features: Tensor, batch: Batch, heads: Sequence[Tensor]) -> Tensor:
        assert batch.learnt is not None
        with self.whole_head():
            return token_scores(features, batch.labels, batch.learnt, self.head.weight, self.head.bias)

    def make_head(self, values: Tensor) -> nn.Linear:
        return self.head

    def whole_head(self) -> AbstractContextManager[None]:
        return gathered(self.head)

    def shortened(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tensor[:, :_TRIAL_TOKENS] for name, tensor in inputs.items()}


def exit_losses(logits: Tensor, labels: Tensor, table: ExitTable) -> Tensor:
    """The loss of each client, [count]: Σ over its exits of cross entropy, plus mutual distillation.

    DepthFL (Kim et al., ICLR 2023): with m exits, λ / (m − 1) Σ_i Σ_{j ≠ i} KL(p_j ‖ p_i), where p_j, the
    teacher, gets no gradient. All means are over the client's samples.

    Args:
        logits: [rows, classes] of all samples at all exits.
        labels: int64 [rows].
        table: how rows belong together, and λ.
    """
    # The row that stands for an absent exit is another client's: even times zero, a NaN of that one would be one here.
    here, present = table.present, table.present.to(logits.dtype)
    entropies = cross_entropy(logits, labels, reduction="none")[table.rows]
    total = entropies.where(here, 0).sum(1)
    if table.distillation > 0:
        log_p = log_softmax(logits, dim=1)[table.rows].where(here[:, :, None], 0)
        p = log_p.detach().exp()
        # KL(p_j ‖ p_i) = Σ p_j log p_j − Σ p_j log p_i, for student i and teacher j.
        cross = torch.einsum("sic,sjc->sij", log_p, p)
        divergence = (p * log_p.detach()).sum(2)[:, None, :] - cross
        pairs = present[:, :, None] * present[:, None, :]
        others = (present.sum(1) - 1).clamp(min=1)
        # The diagonal is KL(p_i ‖ p_i), of value zero but not of gradient zero.
        pairs = pairs * (1 - torch.eye(pairs.shape[1], dtype=pairs.dtype, device=pairs.device))
        total = total + table.distillation * (divergence * pairs).sum((1, 2)) / others
    return logits.new_zeros(table.count).index_add(0, table.clients, total * table.shares)

"""Heads, losses and scores of classifiers and causal language models.

Each client trains a classifier's head of its own. The output layer of a causal language model is frozen and shared by
all clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from fedra_engine.data.samples import NOT_LEARNT, Batch
from fedra_engine.models.sharding import gathered
from fedra_engine.models.token_loss import Watch, prediction_scores, token_cross_entropy, token_scores
from fedra_kernels import RowGroups, head_cross_entropy, head_logits, to_device

_TRIAL_TOKENS = 8
"""Tokens of a text in a trial pass of a language model, whose logits are large."""


@dataclass(frozen=True)
class HeadLayout:
    """Positions of the weight [classes, features] and bias [classes] of a classifier in a vector of `size`.

    Between them are the weight and bias [norm] of the final norm, if it is trained: `norm` is 0 if not. Without
    `has_bias` the bias is zero and not trained, but has its place, since the ops expect one.
    """

    classes: int
    features: int
    has_bias: bool = True
    norm: int = 0
    norm_has_bias: bool = False

    @property
    def size(self) -> int:
        """Parameters of one head."""
        return self.classes * (self.features + 1) + self.norm * (1 + self.norm_has_bias)

    @property
    def trained_size(self) -> int:
        """Trained parameters of one head, which come first."""
        return self.size if self.has_bias else self.size - self.classes

    def weight(self, heads: Tensor) -> Tensor:
        """View […, classes, features] of heads […, size]."""
        return heads[..., : self.classes * self.features].unflatten(-1, (self.classes, self.features))

    def bias(self, heads: Tensor) -> Tensor:
        """View […, classes] of heads […, size]."""
        return heads[..., self.size - self.classes :]

    def norm_parameters(self, heads: Tensor) -> dict[str, Tensor]:
        """Views […, norm] of the norm's `weight` and, if it has one, `bias` in heads […, size]; empty without one."""
        start = self.classes * self.features
        names = ("weight", "bias")[: (self.norm > 0) * (1 + self.norm_has_bias)]
        return {name: heads[..., start + i * self.norm : start + (i + 1) * self.norm] for i, name in enumerate(names)}

    def pack(self, linear: nn.Linear, norm: nn.Module | None = None) -> Tensor:
        """The first `classes` outputs of `linear`, and `norm`, as a new vector [size]; a missing bias is zero."""
        weight = linear.weight.detach()[: self.classes]
        bias = weight.new_zeros(self.classes) if linear.bias is None else linear.bias.detach()[: self.classes]
        scales = [] if norm is None else [parameter.detach().to(weight) for parameter in norm.parameters()]
        return torch.cat([weight.flatten(), *scales, bias])

    def scaled(self, features: Tensor, norms: Mapping[str, Tensor]) -> Tensor:
        """Apply a trained final norm: multiply `features` by `weight` and add `bias` of `norms`; without them, neither.

        `features` is the output of the norm without scale and shift; each of `norms` is [norm], or [rows, norm] with
        one for each row.
        """
        if not norms:
            return features
        # A sample's features may be several vectors of the norm, such as a class token and a mean.
        count = features.shape[-1] // self.norm
        for name, values in norms.items():
            tiled = torch.cat([values] * count, dim=-1)
            if 1 < tiled.dim() < features.dim():
                # One for all tokens of a row.
                tiled = tiled[:, None]
            features = features * tiled if name == "weight" else features + tiled
        return features

    def load(self, head: Tensor, linear: nn.Linear) -> None:
        """Copy `head` [size] into the parameters of `linear`."""
        linear.weight.data.copy_(self.weight(head))
        if self.has_bias:
            linear.bias.data.copy_(self.bias(head))


@dataclass(frozen=True)
class ExitTable:
    """The samples of a batch at each exit.

    Attributes:
        count: number of clients.
        distillation: weight λ of the mutual distillation between a client's exits.
        rows: int64 [samples, exits], the sample's row of the logits at each exit; 0 if absent.
        present: bool [samples, exits], whether the sample's client has that exit.
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
        groups: samples of the pass grouped by head (by client, without `exits`); slots are rows of the banks.
        exits: the samples at several exits; None if every client has one head.
    """

    parameters: Tensor
    gradients: Tensor
    groups: RowGroups
    exits: ExitTable | None

    def scaled(self, features: Tensor, layout: HeadLayout) -> Tensor:
        """`HeadLayout.scaled` of all samples of the pass, each by the norm of its head; backward fills `gradients`."""
        if layout.norm == 0:
            return features
        used, rows = self._norm_rows
        sinks, norms = layout.norm_parameters(self.gradients), dict[str, Tensor]()
        for name, values in layout.norm_parameters(self.parameters).items():
            own = values.index_select(0, used).requires_grad_()
            own.register_hook(partial(_add_rows, sinks[name], used))
            norms[name] = own.index_select(0, rows)
        return layout.scaled(features.to(self.parameters.dtype), norms)

    @cached_property
    def _norm_rows(self) -> list[Tensor]:
        """The rows of the banks that are used, and of these, by its position, that of each sample."""
        owners = np.repeat(np.arange(len(self.groups)), self.groups.sizes)
        return to_device([np.array(self.groups.host_slots), owners], self.parameters.device)


def _add_rows(sink: Tensor, rows: Tensor, gradient: Tensor) -> None:
    sink.index_add_(0, rows, gradient)


class Task(ABC):
    """The differences between a classifier and a causal language model.

    Attributes:
        head: the Linear that makes the logits, as loaded.
        layout: of a client's trained head, and final norm; of `size` 0 if both are frozen.
        auto_class: transformers' auto class for text models is `AutoModelFor<auto_class>`.
        peft_type: PEFT's task type for text models.
    """

    auto_class: str
    peft_type: str

    def __init__(self, head: nn.Linear, layout: HeadLayout) -> None:
        self.head = head
        self.layout = layout

    @property
    def trains_head(self) -> bool:
        """Whether each client trains a head of its own, and not only a norm."""
        return self.layout.classes > 0

    @abstractmethod
    def losses(self, features: Tensor, batch: Batch, heads: PassHeads) -> Tensor:
        """The loss of each client in a pass, [clients]; backward accumulates into the gradients of `heads`.

        `features` are the inputs of the heads for all samples of the `batch`.
        """

    @abstractmethod
    def loss_alone(self, at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
        """The loss of one client, from its logits [samples, …] at each exit, by torch's functions alone."""

    @abstractmethod
    def scores(self, features: Tensor, batch: Batch, heads: Sequence[Tensor], watch: Watch | None = None) -> Tensor:
        """Scores of each sample, float64 [samples, 4].

        The columns are the number of correct predictions, the number of predictions (1 for a classifier, else the
        learnt tokens), how many of them are undefined because logits are not finite, and the sum of the cross entropies
        of the others.

        Args:
            features: inputs of each head, one head after the other, for all samples of the `batch`.
            batch: the samples.
            heads: classifiers [head size], whose logits are averaged.
            watch: sees the predictions, also those without finite logits; those of many tokens in several calls.
        """

    @abstractmethod
    def make_head(self, values: Tensor) -> nn.Linear:
        """The head of a client's own model, with parameters `values` [head size]."""

    def whole_head(self) -> AbstractContextManager[None]:
        """Gather a sharded head; all processes enter this in each pass that has a loss or scores."""
        return nullcontext()

    def shortened(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The part of `inputs` that a trial pass needs."""
        return inputs


class Classification(Task):
    """Classification of images or texts, by a head that each client trains."""

    auto_class = "SequenceClassification"
    peft_type = "SEQ_CLS"

    def losses(self, features: Tensor, batch: Batch, heads: PassHeads) -> Tensor:
        layout, features = self.layout, heads.scaled(features, self.layout).to(heads.parameters.dtype)
        weight, bias = layout.weight(heads.parameters), layout.bias(heads.parameters)
        sinks = layout.weight(heads.gradients), layout.bias(heads.gradients)
        if heads.exits is None:
            losses, _ = head_cross_entropy(features, weight, bias, batch.labels, heads.groups, *sinks)
            return losses
        return exit_losses(head_logits(features, weight, bias, heads.groups, *sinks), batch.labels, heads.exits)

    def loss_alone(self, at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
        # As `exit_losses`, which vectorises it.
        loss = torch.stack([cross_entropy(logits, labels) for logits in at_exits]).sum()
        for student in at_exits:
            for teacher in at_exits:
                if teacher is not student:
                    target = log_softmax(teacher.detach(), dim=1)
                    divergence = kl_div(log_softmax(student, dim=1), target, reduction="batchmean", log_target=True)
                    loss = loss + distillation / (len(at_exits) - 1) * divergence
        return loss

    def scores(self, features: Tensor, batch: Batch, heads: Sequence[Tensor], watch: Watch | None = None) -> Tensor:
        parts, layout = features.to(heads[0].dtype).chunk(len(heads)), self.layout
        pairs = zip(parts, heads, strict=True)
        logits = torch.stack(
            [
                linear(layout.scaled(part, layout.norm_parameters(head)), layout.weight(head), layout.bias(head))
                for part, head in pairs
            ]
        )
        mean, labels = logits.mean(0), batch.labels[: len(parts[0])]
        if watch is not None:
            watch(mean, labels, torch.arange(len(labels), device=labels.device))
        scores = prediction_scores(mean, labels)
        return torch.stack([scores[0], torch.ones_like(scores[0]), *scores[1:]], dim=1)

    def make_head(self, values: Tensor) -> nn.Linear:
        layout = self.layout
        head = nn.Linear(layout.features, layout.classes, layout.has_bias, device=values.device, dtype=values.dtype)
        layout.load(values, head)
        # The head has full precision even if the model does not.
        head.register_forward_pre_hook(lambda module, args: (args[0].to(values.dtype),))
        return head


class CausalLM(Task):
    """Prediction of the next token, by a frozen output layer."""

    auto_class = "CausalLM"
    peft_type = "CAUSAL_LM"

    def losses(self, features: Tensor, batch: Batch, heads: PassHeads) -> Tensor:
        sizes = heads.groups.sizes
        owners = np.repeat(np.arange(len(sizes)), sizes)
        assert batch.learnt is not None
        with self.whole_head():
            output = self.head.weight, self.head.bias
            scaled = heads.scaled(features, self.layout).to(features.dtype)
            return token_cross_entropy(scaled, batch.labels, batch.learnt, *output, owners, len(sizes))

    def loss_alone(self, at_exits: Sequence[Tensor], labels: Tensor, distillation: float) -> Tensor:
        (logits,) = at_exits
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        targets = labels[:, 1:].flatten()
        learnt = (targets != NOT_LEARNT).sum().clamp(min=1)
        return cross_entropy(wide, targets, ignore_index=NOT_LEARNT, reduction="sum") / learnt

    def scores(self, features: Tensor, batch: Batch, heads: Sequence[Tensor], watch: Watch | None = None) -> Tensor:
        assert batch.learnt is not None
        with self.whole_head():
            output = self.head.weight, self.head.bias
            scaled = self.layout.scaled(features, self.layout.norm_parameters(heads[0])).to(features.dtype)
            return token_scores(scaled, batch.labels, batch.learnt, *output, watch)

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
        table: the rows of each sample, and λ.
    """
    # The row of an absent exit is another client's; `where`, as zero times a NaN would be NaN.
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
        # KL(p_i ‖ p_i) on the diagonal is zero, but its gradient is not.
        pairs = pairs * (1 - torch.eye(pairs.shape[1], dtype=pairs.dtype, device=pairs.device))
        total = total + table.distillation * (divergence * pairs).sum((1, 2)) / others
    return logits.new_zeros(table.count).index_add(0, table.clients, total * table.shares)

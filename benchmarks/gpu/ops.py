"""Every op on some of a cohort's clients: the same inputs for a client, whoever shares the launch.

By it a client's results can be compared, bit by bit, with those it gets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.block_shapes import BlockShape
from fedra_kernels import (
    Dropout,
    RowGroups,
    adamw,
    aggregate,
    dropout_key,
    head_cross_entropy,
    head_logits,
    lora_linear,
    low_rank_add,
    sgd,
    squared_norms,
    stream_block,
)

Results = dict[str, Tensor]
"""Results of one op; each tensor's rows, or its slots, are those of the clients given, in order."""


@dataclass(frozen=True)
class Widths:
    """Features in and out of a layer, the adapters' rank and the classes."""

    inputs: int = 768
    outputs: int = 768
    rank: int = 16
    classes: int = 100


class Cohort:
    """Random tensors of some clients; a client's are the same whoever else is there.

    Client k owns slot k of every bank.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        clients: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        widths: Widths,
        dropout: float | None = None,
    ) -> None:
        """`sizes` are the rows of all clients, `clients` those who take part."""
        self._sizes, self._clients, self._device, self._dtype = sizes, clients, device, dtype
        self.widths = widths
        own = [sizes[client] for client in clients]
        self.slots = torch.tensor(list(clients), device=device)
        self.groups = RowGroups(own, torch.tensor(list(clients)), device)
        keys = torch.tensor([dropout_key(client) for client in clients])
        self.dropout = None if dropout is None else Dropout(dropout, keys.to(device))

    def rows(self, purpose: int, features: int) -> Tensor:
        """[rows of the clients, features]."""
        parts = [self._draw(purpose, client, self._sizes[client], features) for client in self._clients]
        return torch.cat(parts).to(self._device, self._dtype)

    def bank(self, purpose: int, *shape: int) -> Tensor:
        """[all clients, *shape]: the whole bank, whichever clients are there."""
        parts = [self._draw(purpose, client, *shape) for client in range(len(self._sizes))]
        return torch.stack(parts).mul_(0.05).to(self._device, self._dtype)

    def frozen(self, purpose: int, *shape: int, scale: float = 0.05) -> Tensor:
        """Weights that all clients share."""
        return self._draw(purpose, -1, *shape).mul_(scale).to(self._device, self._dtype)

    def per_client(self, values: Callable[[int], float]) -> Tensor:
        """float32 [clients]."""
        return torch.tensor([values(client) for client in self._clients], device=self._device)

    def sink(self, bank: Tensor) -> Tensor:
        """Zeros of the shape of `bank`, in float32, that an op adds gradients to."""
        return torch.zeros(bank.shape, device=self._device)

    def of_clients(self, **banks: Tensor) -> Results:
        """Of each bank, the rows of the clients who take part."""
        return {name: bank[self.slots] for name, bank in banks.items()}

    def labels(self) -> Tensor:
        """int64 [rows of the clients]: each client's classes in turn."""
        parts = [torch.arange(self._sizes[client]) % self.widths.classes for client in self._clients]
        return torch.cat(parts).to(self._device)

    @staticmethod
    def _draw(purpose: int, client: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * purpose + client + 1)
        return torch.randn(*shape, generator=generator)


def _lora(cohort: Cohort, *, train_a: bool = True, train_b: bool = True) -> Results:
    w = cohort.widths
    x = cohort.rows(0, w.inputs).requires_grad_()
    lora_a, lora_b = cohort.bank(1, w.rank, w.inputs), cohort.bank(2, w.outputs, w.rank)
    sinks = {"grad_a": cohort.sink(lora_a)} if train_a else {}
    sinks |= {"grad_b": cohort.sink(lora_b)} if train_b else {}
    weight, bias = cohort.frozen(3, w.outputs, w.inputs), cohort.frozen(4, w.outputs)
    y = lora_linear(
        x, weight, bias, lora_a, lora_b, cohort.groups, 0.5, sinks.get("grad_a"), sinks.get("grad_b"), cohort.dropout
    )
    (grad_x,) = torch.autograd.grad(y, x, cohort.rows(5, w.outputs))
    return {"y": y.detach(), "grad_x": grad_x, **cohort.of_clients(**sinks)}


def _lora_frozen_a(cohort: Cohort) -> Results:
    return _lora(cohort, train_a=False)


def _lora_frozen_b(cohort: Cohort) -> Results:
    return _lora(cohort, train_b=False)


def _vit_block(cohort: Cohort) -> Results:
    return _block(cohort, gated=False)


def _llama_block(cohort: Cohort) -> Results:
    return _block(cohort, gated=True)


def _block(cohort: Cohort, *, gated: bool) -> Results:
    """With LayerScale, or gated and with a quarter of the heads for keys; adapters on every Linear."""
    w = cohort.widths
    shape = BlockShape(w.inputs, w.outputs, 4, 1 if gated else 4, gated=gated, rank=w.rank, scaled=not gated)
    purposes = count(10)
    block = shape.block(lambda *sizes: cohort.frozen(next(purposes), *sizes, scale=1.0))
    rows, upstream = cohort.rows(0, w.inputs), cohort.rows(1, w.inputs)
    # Rows of the stream in another order than the clients', among rows of nobody.
    index = torch.arange(len(rows), device=rows.device).flip(0) + 1
    stream, grad = (part.new_zeros(len(part) + 2, w.inputs).index_copy(0, index, part) for part in (rows, upstream))
    bank, dropout = (
        cohort.bank(2, shape.slot_size),
        () if cohort.dropout is None else [cohort.dropout] * len(shape.linears),
    )
    gradients, leaf = cohort.sink(bank), stream.requires_grad_()
    result = stream_block(leaf * 1.0, index, block, _row_by_row, bank, gradients, cohort.groups, dropout)
    (of_stream,) = torch.autograd.grad(result, leaf, grad)
    return {"stream": result.detach()[index], "grad": of_stream[index], **cohort.of_clients(gradients=gradients)}


def _row_by_row(projected: Sequence[Tensor]) -> Tensor:
    """In place of an attention, whose bits may depend on how many samples there are: of queries, keys and values.

    By products and sums alone: torch rounds other functions differently at different places of a tensor.
    """
    queries, *others = projected
    keys, values = (F.pad(part, (0, queries.shape[1] - part.shape[1])) for part in others)
    return queries + keys * values


def _low_rank_add(cohort: Cohort) -> Results:
    w = cohort.widths
    stream = cohort.rows(0, w.inputs).requires_grad_()
    index = torch.arange(len(stream), device=stream.device)
    shapes = (w.inputs, w.rank), (w.rank, w.inputs), (w.rank,), (w.inputs,)
    factors = [cohort.frozen(number, *shape) for number, shape in enumerate(shapes, 1)]
    total = low_rank_add(stream * 1.0, index, *factors)
    (grad,) = torch.autograd.grad(total, stream, cohort.rows(5, w.inputs))
    return {"sum": total.detach(), "grad": grad}


def _head(cohort: Cohort) -> Results:
    features, weight, bias, sinks = _classifiers(cohort)
    losses, correct = head_cross_entropy(
        features, weight, bias, cohort.labels(), cohort.groups, sinks["grad_weight"], sinks["grad_bias"]
    )
    (grad,) = torch.autograd.grad(losses.sum(), features)
    return {"losses": losses.detach(), "correct": correct, "grad": grad, **cohort.of_clients(**sinks)}


def _head_logits(cohort: Cohort) -> Results:
    features, weight, bias, sinks = _classifiers(cohort)
    logits = head_logits(features, weight, bias, cohort.groups, sinks["grad_weight"], sinks["grad_bias"])
    (grad,) = torch.autograd.grad(logits, features, cohort.rows(3, cohort.widths.classes).to(logits.dtype))
    return {"logits": logits.detach(), "grad": grad, **cohort.of_clients(**sinks)}


def _classifiers(cohort: Cohort) -> tuple[Tensor, Tensor, Tensor, Results]:
    w = cohort.widths
    features = cohort.rows(0, w.inputs).requires_grad_()
    weight, bias = cohort.bank(1, w.classes, w.inputs), cohort.bank(2, w.classes)
    return features, weight, bias, {"grad_weight": cohort.sink(weight), "grad_bias": cohort.sink(bias)}


def _optimizers(cohort: Cohort) -> Results:
    size = cohort.widths.inputs * cohort.widths.rank
    param, grad, mean, square = (cohort.bank(purpose, size) for purpose in range(4))
    square.square_()
    lr, clip = cohort.per_client(lambda k: 0.01 * (1 + k % 3)), cohort.per_client(lambda k: 1.0 / (1 + k % 2))
    steps = cohort.slots % 5 + 1
    norms = squared_norms(grad, cohort.slots)
    sgd(param, grad, mean, cohort.slots, lr, clip, steps, momentum=0.9, weight_decay=0.1)
    adamw(
        param, grad, mean, square, cohort.slots, lr, clip, steps,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, zero_grad=True,
    )  # fmt: skip
    return {"norms": norms, **cohort.of_clients(param=param, mean=mean, square=square)}


def _aggregate(cohort: Cohort) -> Results:
    """Each client is the only holder of its own block."""
    values = cohort.bank(0, cohort.widths.inputs * cohort.widths.rank)
    sums, totals = cohort.sink(values), torch.zeros(len(values), device=values.device)
    weights = cohort.per_client(lambda k: 1.0 + k)
    order = torch.arange(len(cohort.slots), device=values.device).flip(0)
    aggregate(sums, totals, values, cohort.slots[order], cohort.slots[order], weights[order])
    return cohort.of_clients(sums=sums, totals=totals)


OPS: dict[str, Callable[[Cohort], Results]] = {
    "lora_linear": _lora,
    "lora_linear, frozen A": _lora_frozen_a,
    "lora_linear, frozen B": _lora_frozen_b,
    "stream_block, ViT": _vit_block,
    "stream_block, LLaMA": _llama_block,
    "low_rank_add": _low_rank_add,
    "head_cross_entropy": _head,
    "head_logits": _head_logits,
    "optimizers": _optimizers,
    "aggregate": _aggregate,
}


def run_op(
    name: str,
    sizes: Sequence[int],
    clients: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    widths: Widths = Widths(),
    dropout: float | None = None,
) -> Results:
    """The results of the op `name` for `clients`, of those whose rows are `sizes`."""
    return OPS[name](Cohort(sizes, clients, device, dtype, widths, dropout))


def part_of(values: Tensor, sizes: Sequence[int], client: int) -> Tensor:
    """The rows, or the slot, of one client in a result for all clients."""
    if len(values) == len(sizes):
        return values[client : client + 1]
    return values.split(list(sizes))[client]

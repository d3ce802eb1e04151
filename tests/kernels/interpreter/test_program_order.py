"""Programs of one launch may run in any order: no two of them write the same place or read another's output.

On a GPU they run at once; the interpreter runs them one after the other, so a race shows when it turns them round.
"""

import pytest
import torch
from triton.runtime import interpreter as triton_interpreter

from fedra_kernels import (
    RowGroups,
    adamw,
    aggregate,
    head_cross_entropy,
    low_rank_add,
    sgd,
    squared_norms,
)

from ..cases import lora_case
from ..helpers import randn


def _backwards(*bounds):
    """The interpreter counts a grid with range(n), and kernels never do."""
    return reversed(range(*bounds)) if len(bounds) == 1 else range(*bounds)


def _randn(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.float32)


def _lora(ranks, dropout):
    return list(lora_case([33, 0, 1, 40], ranks=ranks, dropout=dropout).run().values())


def _low_rank():
    hidden, index = _randn(60, 300, seed=1).requires_grad_(), torch.arange(52).flip(0)
    factors = [_randn(*shape, seed=seed) / 10 for seed, shape in enumerate(((300, 20), (20, 300), (20,), (300,)))]
    out = low_rank_add(hidden * 1.0, index, *factors)
    out.backward(_randn(60, 300, seed=2))
    return [out, hidden.grad]


def _head():
    groups = RowGroups([20, 0, 33], torch.tensor([2, 1, 0]))
    features, weight, bias = _randn(53, 40, seed=1).requires_grad_(), _randn(3, 20, 40, seed=2), _randn(3, 20, seed=3)
    sinks = torch.zeros_like(weight), torch.zeros_like(bias)
    losses, correct = head_cross_entropy(features, weight, bias, torch.arange(53) % 20, groups, *sinks)
    losses.backward(torch.ones(3))
    return [losses, correct, features.grad, *sinks]


def _slots():
    banks = [_randn(4, 2100, seed=seed) for seed in range(5)]
    banks[3].square_()
    slots, ones = torch.tensor([2, 0, 3]), torch.ones(3)
    sgd(banks[0], banks[1], banks[2], slots, ones, ones, slots + 1, momentum=0.9, weight_decay=0.1)
    adamw(
        banks[0], banks[1], banks[2], banks[3], slots, ones, ones, slots + 1,
        betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    sums, totals = torch.zeros(3, 2100), torch.zeros(3)
    aggregate(sums, totals, banks[4], slots, torch.tensor([0, 2, 0]), ones)
    return [*banks, sums, totals, squared_norms(banks[1], slots)]


CALLS = {
    "lora": lambda: _lora((8,), None),
    "lora with dropout": lambda: _lora((8, 3), 0.3),
    "lora with wide ranks": lambda: _lora((40, 3), None),
    "low-rank map": _low_rank,
    "head": _head,
    "slots": _slots,
}


@pytest.mark.parametrize("call", CALLS)
def test_the_order_of_the_programs_does_not_matter(call, monkeypatch):
    forwards = CALLS[call]()
    monkeypatch.setattr(triton_interpreter, "range", _backwards, raising=False)
    backwards = CALLS[call]()
    for first, second in zip(forwards, backwards, strict=True):
        assert torch.equal(first, second)

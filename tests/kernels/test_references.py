"""The references are right themselves: gradcheck compares each with finite differences, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from fedra_kernels import (
    Dropout,
    adamw_reference,
    aggregate_reference,
    head_cross_entropy_reference,
    head_logits_reference,
    lora_linear_reference,
    low_rank_add_reference,
    sgd_reference,
    squared_norms_reference,
    stream_block_reference,
)

from .helpers import SCALE, make_groups, randn
from .stream_cases import stream_case

INDEX = torch.tensor([2, 0])


def _leaves(*shapes):
    return tuple(randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))


@pytest.mark.parametrize("p", [None, 0.4])
def test_lora_linear_reference_passes_gradcheck(p):
    groups = make_groups([2, 0, 1], [3, 1, 0])
    dropout = None if p is None else Dropout(p, torch.arange(3))
    assert gradcheck(
        lambda x, w, bias, a, b: lora_linear_reference(x, w, bias, a, b, groups, SCALE, dropout),
        _leaves((3, 4), (3, 4), (3,), (4, 2, 4), (4, 3, 2)),
    )


@pytest.mark.parametrize("dropout", [None, 0.4])
@pytest.mark.parametrize("name", ["dinov2", "llama"])
def test_stream_block_reference_passes_gradcheck(name, dropout):
    case = stream_case(name, samples=(1, 0, 1), extra=1, dropout=dropout)
    size = case.bank.shape[1]

    def op(stream, adapters):
        bank = torch.zeros(len(case.bank), size, dtype=torch.float64)
        bank = bank.index_copy(0, torch.tensor(case.groups.host_slots), adapters)
        return stream_block_reference(stream, case.index, case.block, case.attend, bank, case.groups, case.dropout)

    leaves = case.stream.requires_grad_(), case.bank[list(case.groups.host_slots)].requires_grad_()
    assert gradcheck(op, leaves, fast_mode=True)


def test_low_rank_add_reference_passes_gradcheck():
    leaves = _leaves((3, 4), (4, 2), (2, 4), (2,), (4,))
    assert gradcheck(lambda x, *factors: low_rank_add_reference(x, INDEX, *factors), leaves)


def test_head_references_pass_gradcheck():
    groups, labels = make_groups([2, 0, 1], [3, 1, 0]), torch.tensor([1, 0, 2])
    assert gradcheck(
        lambda f, w, b: head_cross_entropy_reference(f, w, b, labels, groups)[0],
        _leaves((3, 4), (4, 3, 4), (4, 3)),
    )
    assert gradcheck(
        lambda f, w, b: head_logits_reference(f, w, b, groups),
        _leaves((3, 4), (4, 3, 4), (4, 3)),
    )


def test_aggregate_reference_passes_gradcheck():
    slots, blocks, weights = torch.tensor([1, 0, 2]), torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 0.5]).double()
    leaves = _leaves((2, 3), (2,), (3, 3))
    assert gradcheck(lambda n, d, v: aggregate_reference(n, d, v, slots, blocks, weights), leaves)


def test_optimizer_and_norm_references_pass_gradcheck():
    lr, clip, step = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 0.5]), torch.tensor([1, 7])
    param, grad, mean = _leaves((2, 3), (2, 3), (2, 3))
    square = randn(2, 3, seed=9).square().requires_grad_()
    lr, clip = lr.double(), clip.double()
    assert gradcheck(lambda *t: sgd_reference(*t, lr, clip, step, momentum=0.9, weight_decay=0.1), (param, grad, mean))
    options = {"betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    assert gradcheck(lambda *t: adamw_reference(*t, lr, clip, step, **options), (param, grad, mean, square))
    assert gradcheck(lambda g: squared_norms_reference(g, torch.tensor([1, 0])), (grad,))

"""Sizes at the edge on a GPU: one-row groups, very many clients, tensors beyond 2³¹ elements."""

import pytest
import torch

from ..kernels.far_offsets import CASES, Far, check_far_end
from ..kernels.many_groups import check_one_row_groups

GIBIBYTE = 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_groups(dtype):
    check_one_row_groups(500, "cuda", dtype)


def test_100_000_one_row_groups():
    check_one_row_groups(100_000, "cuda", torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_the_far_end_of_large_tensors_is_like_the_end_of_small_ones(case, large_memory):
    large_memory(36 * GIBIBYTE)

    def zeros(shape, dtype):
        return torch.zeros(shape, dtype=dtype, device="cuda")

    check_far_end(case, Far(zeros, "cuda", torch.bfloat16))

"""Every kernel's offsets are 64-bit where tensors have more than 2³¹ elements.

The memory is mapped and takes room only where it is touched, and only the last program of a launch runs.
"""

import mmap
import sys
from math import prod

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from fedra_kernels._kernels import product_forms

from ..far_offsets import CASES, Far, check_far_end

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python names Linux's flag since 3.13."""


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are touched."""
    size = max(prod(shape), 1)
    memory = mmap.mmap(-1, size * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=size)[: prod(shape)].view(shape)


@pytest.fixture(autouse=True)
def _last_program(monkeypatch):
    """The interpreter runs the last program of each launch alone, and what the ops allocate is mapped.

    Persistent programs have one tile each.
    """
    launch = triton_interpreter.GridExecutor.__call__.__code__

    def last(*bounds):
        return range(*bounds)[-1:] if sys._getframe(1).f_code is launch else range(*bounds)

    def new(self, *size, dtype=None, **_):
        return mapped(tuple(size[0] if not isinstance(size[0], int) else size), dtype or self.dtype)

    monkeypatch.setattr(triton_interpreter, "range", last, raising=False)
    # The interpreter copies every argument back to its device: here onto itself, all of it.
    monkeypatch.setattr(triton_interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(product_forms, "INTERPRETED_PROGRAMS", 2**31)
    for name in ("new_empty", "new_zeros"):
        monkeypatch.setattr(Tensor, name, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_far_end_of_large_tensors_is_like_the_end_of_small_ones(case, dtype):
    check_far_end(case, Far(mapped, "cpu", dtype))

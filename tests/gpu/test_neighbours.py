"""Every op on a GPU: the same bits again, and the same whichever clients share the launch."""

import pytest
import torch

from fedra_engine.benchmarks import gpu_ops

from ..kernels.cases import TOLERANCE

SIZES = (591, 5, 0, 197, 1, 394, 129)
ADAPTED = ("lora_linear", "gather_norm", "gelu", "swiglu")
CASES = [(op, 16, None) for op in gpu_ops.OPS]
CASES += [(op, rank, 0.1) for op in gpu_ops.OPS if op.startswith(ADAPTED) for rank in (16, 100)]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# The second has neither rows of 16 bytes nor whole tiles.
WIDTHS = pytest.mark.parametrize("width", [768, 331])


def _run(op, clients, rank, dropout, dtype, width):
    widths = gpu_ops.Widths(inputs=width, outputs=width + 2, rank=rank, classes=101)
    return gpu_ops.run_op(op, SIZES, clients, torch.device("cuda"), dtype, widths=widths, dropout=dropout)


@WIDTHS
@DTYPES
@pytest.mark.parametrize(("op", "rank", "dropout"), CASES)
def test_a_clients_result_does_not_depend_on_the_others(op, rank, dropout, dtype, width):
    together = _run(op, range(len(SIZES)), rank, dropout, dtype, width)
    for client in (0, 4, 6):
        for name, values in _run(op, [client], rank, dropout, dtype, width).items():
            assert torch.equal(gpu_ops.part_of(together[name], SIZES, client), values), (client, name)


@DTYPES
@pytest.mark.parametrize(("op", "rank", "dropout"), CASES)
def test_runs_repeat_bit_for_bit(op, rank, dropout, dtype):
    first, again = (_run(op, range(len(SIZES)), rank, dropout, dtype, 768) for _ in range(2))
    assert all(torch.equal(again[name], values) for name, values in first.items())

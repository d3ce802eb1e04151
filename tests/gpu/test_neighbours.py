"""Every op on a GPU: the same bits again, and the same whichever clients share the launch."""

import pytest
import torch

from benchmarks.gpu import ops

from ..kernels.cases import TOLERANCE

SIZES = (591, 5, 0, 197, 1, 394, 129)
ADAPTED = ("lora_linear", "stream_block")
CASES = [(op, 16, None) for op in ops.OPS]
CASES += [(op, rank, 0.1) for op in ops.OPS if op.startswith(ADAPTED) for rank in (16, 100)]
# Every shape of a kernel is compiled for: the odd width has neither rows of 16 bytes nor whole tiles.
CASES = [(*case, dtype, 768) for case in CASES for dtype in TOLERANCE]
CASES += [(op, 16, None, torch.bfloat16, 331) for op in ops.OPS]


@pytest.mark.parametrize(("op", "rank", "dropout", "dtype", "width"), CASES, ids=str)
def test_bits_are_the_same_again_and_with_other_clients(op, rank, dropout, dtype, width):
    def run(clients):
        widths = ops.Widths(inputs=width, outputs=width + 2, rank=rank, classes=101)
        return ops.run_op(op, SIZES, clients, torch.device("cuda"), dtype, widths=widths, dropout=dropout)

    together, again = (run(range(len(SIZES))) for _ in range(2))
    for name, values in together.items():
        assert torch.equal(again[name], values), name
    for client in (0, 4, 6):
        for name, values in run([client]).items():
            assert torch.equal(ops.part_of(together[name], SIZES, client), values), (client, name)

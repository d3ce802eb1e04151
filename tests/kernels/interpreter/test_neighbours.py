"""A client's result is the same bit for bit, whichever clients share the launch, for every op."""

import pytest
import torch

from benchmarks.gpu import ops

# Groups end inside tiles of 16 and 32 rows, and the client's own fill several.
SIZES = (13, 37, 0, 20)
CLIENT = 1


ADAPTED = ("lora_linear", "stream_block")
CASES = [(op, 8, None) for op in ops.OPS]
CASES += [(op, rank, 0.3) for op in ops.OPS if op.startswith(ADAPTED) for rank in (8, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "rank", "dropout"), CASES)
def test_a_clients_result_does_not_depend_on_the_others(op, rank, dropout, dtype):
    options = {"widths": ops.Widths(inputs=48, outputs=40, rank=rank, classes=20), "dropout": dropout}
    alone = ops.run_op(op, SIZES, [CLIENT], torch.device("cpu"), dtype, **options)
    together = ops.run_op(op, SIZES, range(len(SIZES)), torch.device("cpu"), dtype, **options)
    for name, values in alone.items():
        assert torch.equal(ops.part_of(together[name], SIZES, CLIENT), values), name

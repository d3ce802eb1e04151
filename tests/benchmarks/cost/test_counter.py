"""What single ops are counted as, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost.counter import Count, counted_ops
from benchmarks.cost.rules import META, OpCall
from benchmarks.kernels.work import Peaks
from fedra_kernels import adamw, low_rank_add
from fedra_kernels._kernels.gather_norm import gather_norm_forward

BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def index(length: int) -> Tensor:
    return meta(length, dtype=torch.int64)


def counted(call: Callable[[], object], *rows_of_client: int) -> OpCall:
    """The only op that a call takes."""
    with counted_ops(rows_of_client) as count:
        call()
    (found,) = count.calls
    assert count.launches == 1
    return found


def step_adamw() -> None:
    param, grad, mean, square = (meta(5, 6, dtype=torch.float32) for _ in range(4))
    rates = meta(2, dtype=torch.float32)
    adamw(param, grad, mean, square, index(2), rates, rates, index(2), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


def add_low_rank() -> None:
    low_rank_add(meta(10, 8), index(4), meta(8, 3), meta(3, 8), meta(3), meta(8))


def normalize() -> None:
    gather_norm_forward(meta(10, 8), index(4), meta(8), meta(8), 1e-6, False, [], None, [], 0)


BY_HAND: dict[str, tuple[Callable[[], object], float, int, int]] = {
    # FLOPs, bytes read, bytes written.
    "product": (lambda: meta(3, 4) @ meta(4, 5), 2 * 3 * 4 * 5, 2 * (12 + 20), 2 * 15),
    "sum": (lambda: meta(3, 4) + meta(3, 4), 0, 2 * 24, 2 * 12),
    "sum with an expanded tensor": (lambda: meta(1, 4).expand(3, 4) + meta(3, 4), 0, 2 * (4 + 12), 2 * 12),
    "sum in place": (lambda: meta(3, 4).add_(1), 0, 2 * 12, 2 * 12),
    "zeros in place": (lambda: meta(3, 4).zero_(), 0, 0, 2 * 12),
    "new zeros": (lambda: meta(9).new_zeros(3, 4), 0, 0, 2 * 12),
    "some rows": (lambda: meta(9, 4).index_select(0, index(2)), 0, 2 * 8 + 16, 2 * 8),
    "some columns": (lambda: meta(9, 4).index_select(1, index(2)), 0, 2 * 18 + 16, 2 * 18),
    "added rows": (lambda: meta(9, 4).index_add_(0, index(2), meta(2, 4)), 0, 2 * 16 + 16, 2 * 8),
    "one entry of each row": (lambda: meta(9, 4).gather(1, meta(9, 1, dtype=torch.int64)), 0, 2 * 9 + 8 * 9, 2 * 9),
    "embedded tokens": (lambda: F.embedding(meta(3, 2, dtype=torch.int64), meta(90, 4)), 0, 2 * 24 + 8 * 6, 2 * 24),
    "copy from the host": (lambda: torch.zeros(3).to(META), 0, 0, 4 * 3),
    "norm of some rows": (normalize, 0, 2 * (32 + 8 + 8) + 32, 2 * 2 * 32 + 2 * 16),
    "low-rank map of some rows": (add_low_rank, 2 * 4 * 48, 2 * (32 + 24 + 24 + 3 + 8) + 32, 2 * 32),
    "optimizer of some slots": (step_adamw, 0, 4 * 4 * 12 + 2 * 16 + 8, 4 * 4 * 12),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_op_is_counted_as_by_hand(name: str) -> None:
    call, *expected = BY_HAND[name]
    found = counted(call)
    assert [found.flops, found.read, found.written] == expected
    assert found.kind == ("products" if name == "product" else "the rest")


@pytest.fixture
def product() -> Iterator[Callable[..., Tensor]]:
    """An op of this project that none of the tables of exceptions names."""
    library = torch.library.Library("fedra_kernels", "FRAGMENT")
    schema = (
        "counted_product(Tensor[] x, Tensor weight, Tensor?[] bank, Tensor? filled, Tensor? chunks, Tensor? residual, "
        "Tensor? residual_index, Tensor(a!)? out, Tensor(b!) sums) -> Tensor"
    )
    library.define(schema)
    library.impl("counted_product", lambda x, weight, *_: x[0].new_empty(len(x[0]), len(weight)), "Meta")
    yield torch.ops.fedra_kernels.counted_product.default
    library._destroy()


def test_an_unknown_op_is_counted_by_its_schema(product: Callable[..., Tensor]) -> None:
    stream, filled = meta(50, 4), meta(2, 4, dtype=torch.int32)
    x, weight, bank, sums = [meta(10, 3), meta(10, 3)], meta(4, 6), [meta(9, 4, 5), None], meta(7, dtype=torch.float32)
    found = counted(lambda: product(x, weight, bank, filled, None, stream, index(10), stream, sums))
    # Two of the nine slots; ten of the stream's rows read and, in place, all of them written.
    factors, rows, written = 2 * 20, 10 * 4, 50 * 4
    assert found.read == 2 * (30 + 30 + 24 + factors + rows) + 2 * 16 + 10 * 8 + 4 * 7
    assert found.written == 2 * (40 + written) + 4 * 7
    assert found.flops == 2 * 10 * (24 + 20)
    assert (found.op, found.kind, found.is_ours) == ("fedra_kernels::counted_product", "products", True)


def test_rows_tell_the_number_of_clients_where_no_table_does(product: Callable[..., Tensor]) -> None:
    def read(rows: int, *rows_of_client: int) -> int:
        x, sums = [meta(rows, 3)], meta(0, dtype=torch.float32)
        call = counted(
            lambda: product(x, meta(4, 3), [meta(9, 4, 5)], None, None, None, None, None, sums), *rows_of_client
        )
        return (call.read - 2 * (rows * 3 + 12)) // (2 * 20)

    assert read(20, 10, 2) == 2
    assert read(14, 10, 2) == 7
    assert read(14) == 9


def test_attention_is_flash_attention_forward_and_backward() -> None:
    q, k, v = (meta(2, 3, 5, 8).requires_grad_() for _ in range(3))
    gradient = meta(2, 3, 5, 8)
    with counted_ops() as count:
        F.scaled_dot_product_attention(q, k, v).backward(gradient)
    attention = count.of(kind="attention")
    forward, backward = sorted(attention.calls, key=lambda call: call.flops)
    size, sums, product = 2 * 2 * 3 * 5 * 8, 4 * 2 * 3 * 5, 2 * 2 * 3 * 5 * 5 * 8
    # The state of the random numbers that dropout would take is in it, too.
    assert (forward.flops, forward.read) == (2 * product, 3 * size)
    assert 0 <= forward.written - size - sums <= 32
    assert (backward.flops, backward.written) == (5 * product, 3 * size)
    assert 0 <= backward.read - 5 * size - sums <= 32
    # Nothing else is left of it.
    assert count.launches == 2


def test_views_allocations_and_the_hosts_own_ops_are_nothing() -> None:
    values = meta(3, 4)
    with counted_ops() as count:
        values.T[:, None].detach()
        torch.empty_like(values)
        values[:0] + values[:0]
        torch.zeros(3) + 1
    assert not count.calls


def test_a_call_takes_as_long_as_its_products_or_its_traffic() -> None:
    count = Count()
    count.calls[OpCall("fedra_kernels::a", "products", 30.0, 4, 6)] = 2
    count.calls[OpCall("aten::b", "the rest", 10.0, 40, 20)] = 1
    assert count.seconds(Peaks("test", 10.0, 5.0)) == 2 * 3.0 + 12.0
    assert (count.launches, count.flops, count.bytes, count.ops) == (3, 70.0, 80, ["aten::b", "fedra_kernels::a"])

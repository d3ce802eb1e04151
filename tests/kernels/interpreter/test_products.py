"""The products in all their forms: segments of columns, x in pieces, the residual stream, rows written in place."""

import pytest
import torch
from triton.runtime import interpreter as triton_interpreter

from fedra_kernels import RowGroups
from fedra_kernels._kernels import product_forms
from fedra_kernels._kernels.lora_gemm import gemm_tile, lora_gemm, lora_gemm_onto
from fedra_kernels._kernels.lora_single_pass import lora_single_pass, lora_single_pass_onto, single_pass_tile

from ..cases import TOLERANCE, assert_close, surrounded
from ..helpers import SCALE, randn
from .test_program_order import _backwards

# The interpreter's forms have 32 rows and 64 or 32 columns.
SIZES = {"straddling": (20, 30, 14), "ragged": (33, 0, 1, 1, 64, 0, 5), "empty": (0, 0)}
SLOT = 3
"""Group g has slot SLOT g."""
STREAM = 150
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=["persistent", "one program a tile"])
def _form(request, monkeypatch):
    """The first form of the interpreter, or the last one; where nothing is aligned, there is only the last."""
    monkeypatch.setattr(product_forms, "MOST_PADDING", 99 if request.param == "persistent" else -1)


class Product:
    """Random inputs amid NaN of one product; every client's are its own, whoever else is there."""

    def __init__(self, sizes, dtype, *, clients=None, depths=(48,), widths=(40,), adapted=(True,), rank=8):
        self.clients = list(range(len(sizes)) if clients is None else clients)
        self.sizes, self.dtype, self.widths, self.rank = [sizes[client] for client in self.clients], dtype, widths, rank
        self.groups = RowGroups(self.sizes, torch.tensor([SLOT * client for client in self.clients]))
        columns, depth, factors = sum(widths), sum(depths), sum(adapted)
        self.x = [self._rows(number, width) for number, width in enumerate(depths)]
        self.shrunk = self._rows(10, rank * factors)
        self.weight = surrounded(self._draw(columns, depth, seed=20))
        self.bias, self.column_scale = (surrounded(self._draw(columns, seed=seed)) for seed in (21, 22))
        self.lora_a = self._bank(sizes, rank, depth, seed=30)
        self.wide_factor = self._bank(sizes, rank, columns, seed=31)
        self.expand = [
            self._bank(sizes, width, rank, seed=40 + number, stride=max(widths) * rank + 5) if some else None
            for number, (width, some) in enumerate(zip(widths, adapted, strict=True))
        ]
        self.stream = surrounded(self._draw(STREAM, columns, seed=50))
        order = torch.randperm(STREAM, generator=torch.Generator().manual_seed(0))
        starts = [sum(sizes[:client]) for client in self.clients]
        parts = [order[start : start + size] for start, size in zip(starts, self.sizes, strict=True)]
        self.index = surrounded(torch.cat(parts))

    def _draw(self, *shape, seed):
        return randn(*shape, seed=seed, dtype=torch.float32).to(self.dtype)

    def _rows(self, seed, columns):
        parts = [
            self._draw(size, columns, seed=1000 * client + seed)
            for client, size in zip(self.clients, self.sizes, strict=True)
        ]
        return surrounded(torch.cat(parts))

    def _bank(self, sizes, *shape, seed, stride=None):
        """NaN in the slots that nobody uses, and behind each slot's numbers."""
        numbers = shape[0] * shape[1]
        bank = torch.full((SLOT * len(sizes), stride or numbers + 5), float("nan"), dtype=self.dtype)
        bank = bank[:, :numbers].unflatten(1, shape)
        for client in range(len(sizes)):
            bank[SLOT * client] = self._draw(*shape, seed=1000 * client + seed)
        return bank

    def arguments(self):
        spans = self.groups.spans(gemm_tile(self.shrunk, self.rank).rows)
        weights, tables = (self.weight, self.bias), (spans, self.groups.filled)
        return self.x, *weights, self.shrunk, self.expand, self.widths, *tables, SCALE, None, 0, False

    def transposed(self):
        """Of the gradient of an input: x holds those of one or more outputs, one factor [slots, rank, columns]."""
        spans = self.groups.spans(gemm_tile(self.shrunk, self.rank).rows)
        weight, factors = self.weight.T.contiguous(), [self.wide_factor]
        return self.x, weight, None, self.shrunk, factors, self.widths, spans, self.groups.filled, None, None, 0, True

    def expected(self, factors=None, scale=SCALE, bias=True):
        """x W^T + bias + scale S E_k^T in float64."""
        y = torch.cat(self.x, 1).double() @ self.weight.double().T
        if bias:
            y += self.bias.double()
        factors = self.expand if factors is None else factors
        start = 0
        for group, size in enumerate(self.sizes):
            rows, slot, column, offset = slice(start, start + size), SLOT * self.clients[group], 0, 0
            for width, factor in zip(self.widths, factors, strict=True):
                if factor is not None:
                    rank = factor.shape[2]
                    shrunk = self.shrunk[rows, offset : offset + rank].double()
                    y[rows, column : column + width] += scale * shrunk @ factor[slot].double().T
                    offset += rank
                column += width
            start += size
        return y


def _close(found, expected, dtype):
    assert_close({"y": found}, {"y": expected}, TOLERANCE[dtype])


SEGMENTS = {
    "equal": ((40, 40, 40), (True, True, True)),
    "unequal": ((70, 16, 33), (True, True, True)),
    "none in the middle": ((40, 33, 64), (True, False, True)),
    "none at first": ((33, 40), (False, True)),
}


@pytest.mark.parametrize(("segments", "sizes"), [*((name, "ragged") for name in SEGMENTS), ("equal", "empty")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments_of_columns_have_factors_of_their_own(segments, sizes, dtype):
    widths, adapted = SEGMENTS[segments]
    product = Product(SIZES[sizes], dtype, widths=widths, adapted=adapted)
    _close(lora_gemm(*product.arguments()), product.expected(), dtype)


def test_segments_equal_the_layers_one_by_one():
    """Bit for bit: whether layers share a launch is no matter of arithmetic."""
    widths, adapted = SEGMENTS["unequal"]
    product = Product(SIZES["ragged"], torch.bfloat16, widths=widths, adapted=adapted)
    x, weight, bias, shrunk, expand, _, *tables = product.arguments()
    together, column = lora_gemm(*product.arguments()), 0
    for number, width in enumerate(widths):
        columns = slice(column, column + width)
        own = shrunk[:, 8 * number : 8 * number + 8].contiguous()
        alone = lora_gemm(x, weight[columns], bias[columns], own, [expand[number]], [width], *tables)
        assert torch.equal(together[:, columns], alone)
        column += width


@pytest.mark.parametrize("depths", [(48, 48, 48), (64, 20, 33), (40, 16)], ids=str)
@pytest.mark.parametrize("rank", [3, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_may_come_in_pieces(depths, rank, dtype):
    """The gradient of an input that several layers read."""
    product = Product(SIZES["straddling"], dtype, depths=depths, rank=rank * len(depths))
    expected = product.expected([product.wide_factor.transpose(1, 2)], 1.0, bias=False)
    _close(lora_gemm(*product.transposed()), expected, dtype)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_stream_is_added(indexed, scaled, dtype):
    product = Product(SIZES["ragged"], dtype)
    index, scale = (product.index if indexed else None), (product.column_scale if scaled else None)
    options = {"residual": product.stream, "residual_index": index, "column_scale": scale}
    y = product.expected() * (product.column_scale.double() if scaled else 1.0)
    rows = product.index if indexed else torch.arange(product.groups.rows)
    expected = product.stream.double()[rows] + y
    _close(lora_gemm(*product.arguments(), **options), expected, dtype)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_written_where_they_belong(added, single_pass, dtype):
    product = Product(SIZES["ragged"], dtype)
    out, expected = product.stream.clone(), product.stream.double()
    options = {"residual": out, "residual_index": product.index, "column_scale": product.column_scale} if added else {}
    if single_pass:
        arguments = _single_pass(product)
        product.shrunk = lora_single_pass_onto(out, product.index, *arguments, **options)
        assert_close({"S": product.shrunk}, {"S": _shrunk(product)}, TOLERANCE[dtype])
    else:
        lora_gemm_onto(out, product.index, *product.arguments(), **options)
    y = product.expected()
    rows = product.index
    expected[rows] = expected[rows] + y * product.column_scale.double() if added else y
    _close(out, expected, dtype)
    others = torch.ones(STREAM, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(out[others], product.stream[others])


def _single_pass(product):
    spans = product.groups.spans(single_pass_tile(product.x[0], product.rank).rows)
    weights = (product.weight, product.bias, product.lora_a, product.expand[0])
    return (product.x[0], *weights, spans, product.groups.filled, SCALE)


def _shrunk(product):
    parts = zip(product.x[0].double().split(product.sizes), product.clients, strict=True)
    return torch.cat([part @ product.lora_a[SLOT * client].double().T for part, client in parts])


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_pass_adds_the_residual_stream(indexed, dtype):
    product = Product(SIZES["straddling"], dtype)
    index = product.index if indexed else None
    y, product.shrunk = lora_single_pass(
        *_single_pass(product), residual=product.stream, residual_index=index, column_scale=product.column_scale
    )
    rows = product.index if indexed else torch.arange(product.groups.rows)
    expected = product.stream.double()[rows] + product.expected() * product.column_scale.double()
    _close(y, expected, dtype)


def test_the_expand_alone_is_added_in_place():
    """What a product by another library needs: sum K = 0, row i for row i."""
    product = Product(SIZES["ragged"], torch.float32)
    x, weight, _, *rest = product.arguments()
    y = (x[0].double() @ weight.double().T + product.bias.double()).float()
    lora_gemm_onto(y, None, [x[0][:, :0]], weight[:, :0], None, *rest, residual=y)
    _close(y, product.expected(), torch.float32)


@pytest.mark.parametrize("outside", [-1, -(2**40), STREAM, 2**40])
def test_rows_outside_the_stream_are_left_out(outside):
    product = Product(SIZES["straddling"], torch.float32)
    product.index[7] = outside
    out, before = product.stream.clone(), product.stream.double()
    arguments = product.arguments()
    options = {"residual": product.stream, "residual_index": product.index}
    y, expected = lora_gemm(*arguments, **options), product.expected()
    lora_gemm_onto(out, product.index, *arguments, **options)
    inside = torch.arange(len(y)) != 7
    expected[inside] += before[product.index[inside]]
    _close(y, expected, torch.float32)
    before[product.index[inside]] = expected[inside]
    _close(out, before, torch.float32)


def _all_forms(product):
    """Every form of the product on the same inputs."""
    arguments = product.arguments()
    stream = {"residual": product.stream, "residual_index": product.index, "column_scale": product.column_scale}
    outs = [product.stream.clone() for _ in range(2)]
    lora_gemm_onto(outs[0], product.index, *arguments, **{**stream, "residual": outs[0]})
    found = [lora_gemm(*arguments), lora_gemm(*arguments, **stream), outs[0][product.index]]
    if len(product.widths) == 1:
        shrunk = lora_single_pass_onto(
            outs[1], product.index, *_single_pass(product), **{**stream, "residual": outs[1]}
        )
        found += [shrunk, outs[1][product.index], *lora_single_pass(*_single_pass(product), **stream)]
    return found


CASES = {
    "one layer": {},
    "three layers": {"widths": (70, 16, 33), "adapted": (True, False, True)},
    "wide rank": {"widths": (40, 40, 40), "adapted": (True, True, True), "rank": 40},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_clients_result_does_not_depend_on_the_others(case, dtype):
    alone = _all_forms(Product(SIZES["ragged"], dtype, clients=[4], **CASES[case]))
    together = _all_forms(Product(SIZES["ragged"], dtype, **CASES[case]))
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found[35:99], expected)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_the_programs_does_not_matter(case, monkeypatch):
    forwards = _all_forms(Product(SIZES["ragged"], torch.float32, **CASES[case]))
    monkeypatch.setattr(triton_interpreter, "range", _backwards, raising=False)
    backwards = _all_forms(Product(SIZES["ragged"], torch.float32, **CASES[case]))
    for first, second in zip(forwards, backwards, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_client_that_diverged_harms_nobody_else(wrong):
    widths, adapted = SEGMENTS["unequal"]
    healthy, broken = (Product(SIZES["straddling"], torch.float32, widths=widths, adapted=adapted) for _ in range(2))
    broken.expand[1][SLOT, 2, 1] = wrong
    expected, found = _all_forms(healthy), _all_forms(broken)
    for want, have in zip(expected, found, strict=True):
        for rows in (slice(0, 20), slice(50, 64)):
            assert torch.equal(have[rows], want[rows])
        assert not have[20:50].isfinite().all()

"""The launchers of a block's steps, on inputs amid NaN, against torch in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedra_kernels import Dropout, RowGroups, dropout_key
from fedra_kernels._kernels.activation import activation_forward, activation_tile
from fedra_kernels._kernels.activation_gradient import activation_gradient
from fedra_kernels._kernels.configs import NARROW_RANK, gradient_chunk
from fedra_kernels._kernels.gather_norm import gather_norm_backward, gather_norm_forward, norm_tile
from fedra_kernels._kernels.lora_grad_outer import lora_grad_outer
from fedra_kernels._kernels.lora_grad_output import lora_grad_output
from fedra_kernels._kernels.row_tables import Chunks
from fedra_kernels.dropout import keep_mask

from .cases import TOLERANCE, assert_close, surrounded
from .helpers import SCALE, randn

EPS = 1e-5
EXTRA = 7
"""Rows of the stream that the block does not hold."""


class Launcher:
    """Draws for groups of rows of these sizes, of which group g has slot 2 g + 1, and compares."""

    def __init__(
        self,
        sizes: Sequence[int],
        device: str,
        dtype: torch.dtype,
        *,
        dropout: float | None = None,
        tolerance: float = 0.0,
    ) -> None:
        self.device, self.dtype, self.tolerance = device, dtype, max(tolerance, TOLERANCE[dtype])
        self.slots = [2 * group + 1 for group in range(len(sizes))]
        self.groups = RowGroups(sizes, torch.tensor(self.slots, dtype=torch.int64), device)
        self.rows, self.p = sum(sizes), dropout
        self._seed = 0

    def matrix(self, rows: int, columns: int, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        self._seed += 1
        values = randn(rows, columns, seed=self._seed, dtype=torch.float32) * scale + shift
        return surrounded(values.to(self.device, self.dtype))

    def vector(self, length: int) -> Tensor:
        return self.matrix(1, length)[0]

    def index(self, count: int) -> Tensor:
        """As many different ones of `count` rows as the groups have."""
        self._seed += 1
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self._seed))
        return surrounded(order[: self.rows].to(self.device))

    def bank(self, *shape: int) -> Tensor:
        """NaN but for the slots in use, and behind each slot."""
        numbers = shape[0] * shape[1]
        bank = torch.full((2 * len(self.slots) + 1, numbers + 8), torch.nan, dtype=self.dtype, device=self.device)
        bank = bank[:, :numbers].unflatten(1, shape)
        for slot in self.slots:
            bank[slot] = self.matrix(*shape, scale=shape[1] ** -0.5)
        return bank

    def dropout(self, number: int) -> Dropout | None:
        if self.p is None:
            return None
        keys = [dropout_key(number, slot) for slot in self.slots]
        return Dropout(self.p, torch.tensor(keys, dtype=torch.int64, device=self.device))

    def dropped(self, x: Tensor, dropout: Dropout | None) -> Tensor:
        """x in float64 with zeros for what is dropped."""
        return x.double() if dropout is None else x.double() * keep_mask(dropout, self.groups.sizes, x.shape[1])

    def shrunk(self, x: Tensor, bank: Tensor) -> Tensor:
        """x A_k^T in float64."""
        parts = zip(x.double().split(self.groups.sizes), self.slots, strict=True)
        return torch.cat([part @ bank[slot].double().T for part, slot in parts] or [x.double()[:, : bank.shape[1]]])

    @property
    def chunks(self) -> Chunks:
        return self.groups.chunks(gradient_chunk(torch.empty(0, device=self.device)))

    def sums(self, columns: int) -> Tensor:
        """NaN, for the sums of every chunk of rows."""
        return torch.full((len(self.chunks.rows), columns), torch.nan, device=self.device)

    def of_groups(self, sums: Tensor) -> Tensor:
        """The sums of each group's chunks, zeros for a group without rows."""
        found = sums.new_zeros(len(self.slots), sums.shape[1])
        for _, group, first, end in self.chunks.groups.tolist():
            found[group] = sums[first:end].sum(0)
        return found

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T right of each group in float64, as rows."""
        parts = (tensor.double().split(self.groups.sizes) for tensor in (left, right))
        return torch.stack([(one.T @ other).flatten() for one, other in zip(*parts, strict=True)])

    def compare(self, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert_close(found, expected, self.tolerance)


def check_norm(
    launcher: Launcher, kind: str, features: int, *, banks: int, rank: int = 8, indexed: bool = True
) -> None:
    """Forward with the S of up to three adapters, and backward onto a residual into some rows of a stream."""
    case, rms = launcher, kind == "rms"
    stream = case.matrix(case.rows + (EXTRA if indexed else 0), features, shift=3.0)
    index = case.index(len(stream)) if indexed else None
    weight, bias = case.vector(features), None if rms else case.vector(features)
    lora_a, drops = [case.bank(rank, features) for _ in range(banks)], [case.dropout(number) for number in range(banks)]
    chunks = case.groups.chunks(norm_tile(stream, lora_a).rows).rows if banks else None
    keys = [drop.keys for drop in drops if drop is not None]
    threshold = drops[0].threshold if keys and drops[0] is not None else 0
    x, kept, mean, inverse, shrunk = gather_norm_forward(
        stream, index, weight, bias, EPS, rms, lora_a, chunks, keys, threshold
    )
    read = stream if index is None else stream[index]
    assert torch.equal(kept, read if indexed else read[:0])
    wide = read.double().requires_grad_()
    normed = _norm(wide, weight, bias)
    case.compare({"x": x}, {"x": normed})
    expected = [case.shrunk(case.dropped(x, drop), bank) for bank, drop in zip(lora_a, drops, strict=True)]
    assert shrunk.shape == (case.rows, banks * rank)
    if banks:
        case.compare({"S": shrunk}, {"S": torch.cat(expected, dim=1)})

    grad, residual, out = (case.matrix(rows, features) for rows in (case.rows, len(stream) + 3, len(stream) + 5))
    residual_index, out_index = (case.index(len(part)) if indexed else None for part in (residual, out))
    before, rows = out.clone(), read.contiguous() if indexed else stream
    gather_norm_backward(grad, weight, rows, mean, inverse, rms, residual, residual_index, out, out_index)
    (of_rows,) = torch.autograd.grad(normed, wide, grad.double())
    places = torch.arange(case.rows, device=case.device) if out_index is None else out_index
    bypass = residual[: case.rows] if residual_index is None else residual[residual_index]
    case.compare({"grad": out[places]}, {"grad": of_rows + bypass.double()})
    others = torch.ones(len(out), dtype=torch.bool, device=case.device)
    others[places] = False
    assert torch.equal(out[others], before[others])


def _norm(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float64; RMSNorm has no bias."""
    if bias is None:
        return F.rms_norm(rows, rows.shape[1:], weight.double(), EPS)
    return F.layer_norm(rows, rows.shape[1:], weight.double(), bias.double(), EPS)


def check_activation(launcher: Launcher, kind: str, features: int, *, rank: int, of: str = "AB") -> None:
    """Forward with S; backward with dA of what reads the activation and dB of what has made its input."""
    case, gated = launcher, kind == "swiglu"
    wide = case.matrix(case.rows, features * (2 if gated else 1), scale=2.0)
    x, up = wide.chunk(2, dim=1) if gated else (wide, None)
    lora_a, drop = case.bank(rank, features), case.dropout(0)
    keys, threshold = (None, 0) if drop is None else (drop.keys, drop.threshold)
    narrow = rank <= NARROW_RANK
    tile = activation_tile(x, lora_a if narrow else None)
    y, *shrunk = activation_forward(
        kind, x, up, lora_a if narrow else None, case.groups.chunks(tile.rows).rows if narrow else None,
        keys if narrow else None, threshold,
    )  # fmt: skip
    leaves = [part.double().requires_grad_() for part in ((x, up) if up is not None else (x,))]
    if gated:
        expected = F.silu(leaves[0]) * leaves[1]
    else:
        expected = F.gelu(leaves[0], approximate="none" if kind == "gelu" else "tanh")
    case.compare({"y": y}, {"y": expected})
    assert len(shrunk) == narrow
    if narrow:
        case.compare({"S": shrunk[0]}, {"S": case.shrunk(case.dropped(y, drop), lora_a)})

    grad_y, grad_wide = case.matrix(case.rows, features), torch.full_like(wide, torch.nan)
    grad_x, grad_up = grad_wide.chunk(2, dim=1) if gated else (grad_wide, None)
    grad_shrunk, of_maker = (case.matrix(case.rows, rank) for _ in range(2))
    has_a, has_b, length = "A" in of, "B" in of, rank * features
    sums = case.sums(2 * length + 10)
    activation_gradient(
        kind, grad_y, x, up, grad_x, grad_up, case.chunks.rows, sums if has_a or has_b else None,
        grad_shrunk if has_a else None, 3, keys if has_a else None, threshold,
        of_maker if has_b else None, length + 6, SCALE,
    )  # fmt: skip
    grads = torch.autograd.grad(expected, leaves, grad_y.double())
    case.compare({"grad": grad_wide}, {"grad": torch.cat(grads, dim=1)})
    found = case.of_groups(sums)
    if has_a:
        wanted = case.outer(grad_shrunk, case.dropped(expected.detach(), drop))
        case.compare({"dA": found[:, 3 : length + 3]}, {"dA": wanted})
    if has_b:
        wanted = SCALE * case.outer(grads[0], of_maker)
        case.compare({"dB": found[:, length + 6 : 2 * length + 6]}, {"dB": wanted})
    written = (has_a + has_b) * length
    assert (~sums.isnan()).sum(1).eq(written).all(), "sums of others were touched"


def check_output_gradient(
    launcher: Launcher,
    widths: Sequence[int],
    *,
    rank: int,
    indexed: bool = False,
    scaled: bool = False,
    trained: bool = True,
) -> None:
    """dS and dB of one to three layers, the rows of one of them gathered and scaled."""
    case, length = launcher, len(widths)
    stored = [case.matrix(case.rows + EXTRA, width + 4)[:, :width] for width in widths]
    index, factors = case.index(len(stored[0])) if indexed else None, case.vector(widths[0]) if scaled else None
    given = stored if indexed else [grad[: case.rows] for grad in stored]
    banks, shrunk = [case.bank(width, rank) for width in widths], case.matrix(case.rows, length * rank)
    # Of one bank, as in a slot: one stride between slots.
    joined = torch.cat([bank.flatten(1) for bank in banks], dim=1)
    splits = joined.split([rank * width for width in widths], dim=1)
    banks = [part.unflatten(1, (width, rank)) for part, width in zip(splits, widths, strict=True)]
    columns = [5 + rank * sum(widths[:number]) for number in range(length)]
    sums = case.sums(rank * sum(widths) + 9)
    grad_shrunk, rows = lora_grad_output(
        given, banks, shrunk, case.chunks.rows, sums if trained else None, columns, SCALE, index, factors
    )
    grads = [grad if index is None else grad[index] for grad in given]
    if factors is not None:
        grads = [grad.double() * factors.double() for grad in grads]
    assert len(rows) == (case.rows if indexed or scaled else 0)
    if len(rows):
        case.compare({"rows": rows}, {"rows": grads[0]})
    expected = [SCALE * case.shrunk(grad, bank.transpose(1, 2)) for grad, bank in zip(grads, banks, strict=True)]
    case.compare({"dS": grad_shrunk}, {"dS": torch.cat(expected, dim=1)})
    if trained:
        parts = shrunk.chunk(length, dim=1)
        wanted = [SCALE * case.outer(grad, part) for grad, part in zip(grads, parts, strict=True)]
        case.compare({"dB": case.of_groups(sums)[:, 5:-4]}, {"dB": torch.cat(wanted, dim=1)})
        sums = sums[:, [*range(5), *range(-4, 0)]]
    assert sums.isnan().all(), "sums of others were touched"


def check_outer(launcher: Launcher, kind: str | None, features: int, *, rank: int, banks: int = 1) -> None:
    """dA of layers that have read x, or the norm of rows, which is computed again."""
    case, ranks = launcher, rank * banks
    rows, narrow = case.matrix(case.rows, features, shift=3.0), case.matrix(case.rows, ranks + 4)
    drop = case.dropout(0)
    keys, threshold = (None, 0) if drop is None else (drop.keys, drop.threshold)
    moments: tuple[Tensor | None, ...] = (None, None, None, None)
    x = rows.double()
    if kind is not None:
        weight, bias = case.vector(features), case.vector(features) if kind == "layer" else None
        mean = x.mean(1) if kind == "layer" else torch.zeros_like(x[:, 0])
        inverse = torch.rsqrt((x - mean[:, None]).square().mean(1) + EPS)
        moments = surrounded(mean.float()), surrounded(inverse.float()), weight, bias
        x = _norm(x, weight, bias)
    sums = case.sums(ranks * features + 6)
    lora_grad_outer(rows, narrow, case.chunks.rows, sums, 4, 2, ranks, True, 1.0, keys, threshold, *moments)
    wanted = case.outer(narrow[:, 2 : 2 + ranks], case.dropped(x, drop))
    case.compare({"dA": case.of_groups(sums)[:, 4:-2]}, {"dA": wanted})
    assert sums[:, [0, 1, 2, 3, -2, -1]].isnan().all(), "sums of others were touched"


def check_rows_outside(device: str, features: int) -> None:
    """On a GPU an index is not checked on the host, but no kernel follows it outside."""
    case = Launcher([4], device, torch.float32)
    bad, good = torch.tensor([-1, 2, 4, 10**12], device=device), 1
    stream, ones = case.matrix(4, features), torch.ones(features, device=device)
    x, _, mean, inverse, _ = gather_norm_forward(stream, bad, ones, ones, EPS, False, [], None, [], 0)
    assert x.isnan().all(1).tolist() == [True, False, True, True]
    before, out = stream.clone(), stream.clone()
    gather_norm_backward(stream, ones, stream, mean, inverse, False, stream, bad, out, bad)
    assert torch.equal(out[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(out[2], before[2])
    sums, bank = case.sums(8 * features), case.bank(features, 8)
    grad_shrunk, rows = lora_grad_output(
        [stream], [bank], case.matrix(4, 8), case.chunks.rows, sums, [0], SCALE, bad, None
    )
    assert torch.equal(rows[good], stream[2])
    assert not rows[[0, 2, 3]].any()
    assert not grad_shrunk[[0, 2, 3]].any()

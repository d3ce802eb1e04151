"""As many clients as there are rows: every op over one-row groups against batched float64 arithmetic."""

from __future__ import annotations

from itertools import count as count_from

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.block_shapes import BlockShape
from fedra_kernels import (
    AdaptedLayer,
    Norm,
    RowGroups,
    aggregate,
    head_cross_entropy,
    lora_linear,
    sgd,
    squared_norms,
    stream_block,
)

from .cases import TOLERANCE, assert_close
from .helpers import SCALE, randn

WIDTH, RANK, CLASSES, BLOCKS = 64, 8, 10, 12


def check_one_row_groups(count: int, device: str, dtype: torch.dtype) -> None:
    """Client k, the owner of slot count - 1 - k, has the row k."""
    groups = RowGroups([1] * count, torch.arange(count).flip(0), device)

    def draw(*shape: int, seed: int) -> Tensor:
        return (randn(*shape, seed=seed, dtype=torch.float32) / shape[-1] ** 0.5).to(device, dtype)

    _check_lora_linear(groups, draw, dtype)
    # A client's adapters of a block, with their gradients in float64, take 160 kB.
    few = min(count, 2000)
    _check_block(RowGroups([1] * few, torch.arange(few).flip(0), device), draw, dtype)
    _check_head(groups, draw, dtype)
    _check_slots(count, draw, dtype)


def _check_lora_linear(groups: RowGroups, draw, dtype: torch.dtype) -> None:
    count = len(groups)
    x, grad_y = draw(count, WIDTH, seed=1).requires_grad_(), draw(count, WIDTH, seed=2)
    weight, lora_a, lora_b = (
        draw(WIDTH, WIDTH, seed=3),
        draw(count, RANK, WIDTH, seed=4),
        draw(count, WIDTH, RANK, seed=5),
    )
    sinks = [torch.zeros(bank.shape, device=bank.device) for bank in (lora_a, lora_b)]
    y = lora_linear(x, weight, None, lora_a, lora_b, groups, SCALE, *sinks)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)

    rows, upstream, frozen = x.detach().double(), grad_y.double(), weight.double()
    slots = list(groups.host_slots)
    a, b = (bank[slots].double() for bank in (lora_a, lora_b))
    shrunk = torch.einsum("ki,kri->kr", rows, a)
    grad_shrunk = SCALE * torch.einsum("ko,kor->kr", upstream, b)
    expected = {
        "y": rows @ frozen.T + SCALE * torch.einsum("kr,kor->ko", shrunk, b),
        "grad_x": upstream @ frozen + torch.einsum("kr,kri->ki", grad_shrunk, a),
        "grad_a": grad_shrunk[:, :, None] * rows[:, None],
        "grad_b": SCALE * upstream[:, :, None] * shrunk[:, None],
    }
    found = {"y": y, "grad_x": grad_x}
    found |= {name: sink[slots] for name, sink in zip(("grad_a", "grad_b"), sinks, strict=True)}
    assert_close(found, expected, TOLERANCE[dtype])


def _check_block(groups: RowGroups, draw, dtype: torch.dtype) -> None:
    shape, seeds = BlockShape(WIDTH, 2 * WIDTH, 1, 1, gated=False, rank=RANK), count_from(20)
    block = shape.block(lambda *sizes: draw(*sizes, seed=next(seeds)) * sizes[-1] ** 0.5)
    count, slots = len(groups), list(groups.host_slots)
    stream, bank = draw(count, WIDTH, seed=11) * WIDTH**0.5, draw(count, shape.slot_size, seed=12) * RANK
    upstream, leaf = draw(count, WIDTH, seed=13), stream.detach().requires_grad_()
    gradients = torch.zeros(bank.shape, device=bank.device)
    out = stream_block(leaf, None, block, _row_by_row, bank, gradients, groups)
    (grad,) = torch.autograd.grad(out, leaf, upstream)

    rows, used = stream.double().requires_grad_(), bank[slots].double().requires_grad_()

    def adapted(x: Tensor, layer: AdaptedLayer) -> list[Tensor]:
        factors = zip(layer.parts(), layer.lora_a(used), layer.lora_b(used), strict=True)
        return [
            F.linear(x, weight.double(), bias.double())
            + layer.scale * torch.einsum("kr,kor->ko", torch.einsum("ki,kri->kr", x, a), b)
            for (weight, bias), a, b in factors
        ]

    def norm(x: Tensor, of: Norm) -> Tensor:
        return F.layer_norm(x, (WIDTH,), of.weight.double(), of.bias.double(), of.eps)

    (attended,) = adapted(_row_by_row(adapted(norm(rows, block.norm1), block.attention_inputs)), block.attention_output)
    middle = rows + attended
    (wide,) = adapted(norm(middle, block.norm2), block.mlp_inputs)
    expected = middle + adapted(F.gelu(wide), block.mlp_output)[0]
    wanted = torch.autograd.grad(expected, (rows, used), upstream.double())
    found = {"out": out, "grad": grad, "bank": gradients[slots]}
    # Products follow one another: the roundings of six.
    assert_close(found, dict(zip(found, (expected, *wanted), strict=True)), 4 * TOLERANCE[dtype])


def _row_by_row(projected: list[Tensor]) -> Tensor:
    """In place of an attention: of queries, keys and values."""
    queries, keys, values = projected
    return queries * torch.sigmoid(keys) + values


def _check_head(groups: RowGroups, draw, dtype: torch.dtype) -> None:
    count = len(groups)
    features, weight, bias = (
        draw(count, WIDTH, seed=6),
        draw(count, CLASSES, WIDTH, seed=7),
        draw(count, CLASSES, seed=8),
    )
    labels, slots = torch.arange(count, device=features.device) % CLASSES, list(groups.host_slots)
    sinks = [torch.zeros(bank.shape, device=bank.device) for bank in (weight, bias)]
    features.requires_grad_()
    losses, _ = head_cross_entropy(features, weight, bias, labels, groups, *sinks)
    losses.sum().backward()
    leaves = [leaf.detach().double().requires_grad_() for leaf in (features, weight[slots], bias[slots])]
    logits = torch.einsum("ki,kci->kc", leaves[0], leaves[1]) + leaves[2]
    expected = F.cross_entropy(logits, labels, reduction="none")
    grads = torch.autograd.grad(expected.sum(), leaves)
    found = {
        "losses": losses,
        "features": features.grad,
        "weight": sinks[0][slots],
        "bias": sinks[1][slots],
    }
    assert_close(found, dict(zip(found, (expected, *grads), strict=True)), TOLERANCE[dtype])


def _check_slots(count: int, draw, dtype: torch.dtype) -> None:
    param, grad = draw(count, WIDTH, seed=9), draw(count, WIDTH, seed=10)
    slots = torch.arange(count, device=param.device).flip(0)
    rates = torch.linspace(0.5, 1.0, count, device=param.device)
    norms = squared_norms(grad, slots)
    sums, totals = torch.zeros(BLOCKS, WIDTH, device=param.device), torch.zeros(BLOCKS, device=param.device)
    aggregate(sums, totals, grad, slots, slots % BLOCKS, rates)
    stepped = param[slots].double() - (rates * rates)[:, None].double() * grad[slots].double()
    sgd(param, grad, None, slots, rates, rates, slots + 1, momentum=0.0, weight_decay=0.0)
    weighted = rates[:, None].double() * grad[slots].double()
    expected = torch.zeros(BLOCKS, WIDTH, dtype=torch.float64, device=param.device)
    expected.index_add_(0, slots % BLOCKS, weighted)
    assert_close({"param": param[slots]}, {"param": stepped}, TOLERANCE[dtype])
    assert_close(
        {"norms": norms, "sums": sums}, {"norms": grad[slots].double().square().sum(1), "sums": expected}, 1e-5
    )

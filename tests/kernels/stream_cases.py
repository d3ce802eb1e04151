"""Random pre-norm blocks on a residual stream, and what `stream_block` and its reference make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedra_kernels import (
    AdaptedLayer,
    AdapterColumns,
    Dropout,
    GradientHandOver,
    Norm,
    RowGroups,
    StreamBlock,
    dropout_key,
    stream_block,
    stream_block_reference,
)

TOKENS, FEATURES, HEAD = 5, 24, 8


@dataclass(frozen=True)
class Kind:
    """A family of blocks: the adapters' rank, and which Linears have one, in the order q, k, v, o, (gate,) fc1, fc2."""

    norm: str = "layer"
    activation: str = "gelu"
    merged: bool = False
    scaled: bool = False
    key_heads: int = 3
    normed_heads: bool = False
    rank: int = 3
    without: tuple[int, ...] = ()


KINDS = {
    "vit": Kind(),
    "dinov2": Kind(scaled=True, activation="gelu_tanh"),
    "timm": Kind(merged=True, without=(1,)),
    "llama": Kind(norm="rms", activation="swiglu", key_heads=1),
    "qwen3": Kind(norm="rms", activation="swiglu", key_heads=1, normed_heads=True, without=(1, 4)),
    "high rank": Kind(rank=40, scaled=True),
    "high rank, gated": Kind(norm="rms", activation="swiglu", key_heads=1, rank=40),
    "without attention": Kind(without=(0, 1, 2, 3), scaled=True),
    "without mlp": Kind(without=(4, 5)),
}


@dataclass
class StreamCase:
    """Inputs of a call, and the upstream gradient; bank rows that no group has are NaN."""

    stream: Tensor
    index: Tensor | None
    block: StreamBlock
    bank: Tensor
    groups: RowGroups
    dropout: list[Dropout | None]
    upstream: Tensor
    kind: Kind

    def attend(self, projected: Sequence[Tensor]) -> Tensor:
        """Attention within each sample, with fewer heads for keys and values than for queries."""
        rows = projected[0].shape[0]
        if len(projected) == 1:
            projected = projected[0].chunk(3, dim=1)
        q, k, v = (part.reshape(rows // TOKENS, TOKENS, -1, HEAD).transpose(1, 2) for part in projected)
        if self.kind.normed_heads:
            q, k = (F.rms_norm(part, (HEAD,)) for part in (q, k))
        repeats = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) * HEAD**-0.5, dim=-1)
        return (weights @ v).transpose(1, 2).reshape(rows, -1)

    def flash_attend(self, projected: Sequence[Tensor]) -> Tensor:
        """The same without norms of heads, by torch's op."""
        rows = projected[0].shape[0]
        q, k, v = (part.reshape(rows // TOKENS, TOKENS, -1, HEAD).transpose(1, 2) for part in projected)
        attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return attended.transpose(1, 2).reshape(rows, -1)

    def run(
        self,
        *,
        trains: str = "both",
        recompute: bool = False,
        needs_stream: bool = True,
        hand_over: GradientHandOver | None = None,
        times: int = 1,
    ) -> dict[str, Tensor]:
        """The stream after the block, `times` over, and the gradients of stream and used slots."""
        leaf, bank = self.stream.detach().requires_grad_(needs_stream), self.bank.detach().requires_grad_()
        wide = torch.float64 if bank.dtype == torch.float64 else torch.float32
        gradients = torch.full(bank.shape, torch.nan, dtype=wide, device=bank.device)
        used = list(self.groups.host_slots)
        gradients[used] = 0.0
        out = leaf * 1.0
        for _ in range(times):
            out = stream_block(
                out, self.index, self.block, self.attend, bank, gradients, self.groups, self.dropout,
                trains_a=trains != "B", trains_b=trains != "A", recompute=recompute, hand_over=hand_over,
            )  # fmt: skip
        (out * self.upstream).sum().backward()
        found = {"out": out.detach(), "bank": gradients[used]}
        return found | ({"stream": leaf.grad} if leaf.grad is not None else {})

    def expected(self, *, trains: str = "both", times: int = 1) -> dict[str, Tensor]:
        """The same by the reference in float64."""
        wide = self.in_dtype(torch.float64)
        leaf, bank = wide.stream.requires_grad_(), wide.bank.requires_grad_()
        out = leaf
        for _ in range(times):
            out = stream_block_reference(out, wide.index, wide.block, wide.attend, bank, wide.groups, wide.dropout)
        (out * wide.upstream).sum().backward()
        assert leaf.grad is not None
        assert bank.grad is not None
        first_b = min((a.first_b for layer in wide.block.layers for a in layer.present), default=0)
        frozen = {"both": slice(0, 0), "A": slice(first_b, None), "B": slice(0, first_b)}[trains]
        bank.grad[:, frozen] = 0.0
        return {"out": out.detach(), "bank": bank.grad[list(self.groups.host_slots)], "stream": leaf.grad}

    def in_dtype(self, dtype: torch.dtype) -> StreamCase:
        """The same values."""
        return replace(
            self,
            stream=self.stream.detach().to(dtype),
            block=in_dtype(self.block, dtype),
            bank=self.bank.detach().to(dtype),
            upstream=self.upstream.to(dtype),
        )

    def to(self, device: str) -> StreamCase:
        drops = [None if drop is None else Dropout(drop.p, drop.keys.to(device)) for drop in self.dropout]
        return replace(
            self,
            stream=self.stream.to(device),
            index=None if self.index is None else self.index.to(device),
            block=in_dtype(self.block, self.stream.dtype, device),
            bank=self.bank.to(device),
            groups=RowGroups(self.groups.sizes, torch.tensor(self.groups.host_slots), device),
            dropout=drops,
            upstream=self.upstream.to(device),
        )


def in_dtype(block: StreamBlock, dtype: torch.dtype, device: str | None = None) -> StreamBlock:
    """The same values, on a device if one is given."""
    return with_tensors(block, lambda tensor: tensor.to(device or tensor.device, dtype))


def with_tensors(block: StreamBlock, change: Callable[[Tensor], Tensor]) -> StreamBlock:
    """The block with every tensor changed."""
    parts: dict[str, Any] = {}
    for name, part in vars(block).items():
        if isinstance(part, Norm | AdaptedLayer):
            bias = None if part.bias is None else change(part.bias)
            parts[name] = replace(part, weight=change(part.weight), bias=bias)
        elif isinstance(part, Tensor):
            parts[name] = change(part)
    return replace(block, **parts)


def stream_case(
    name: str,
    *,
    samples: Sequence[int] = (2, 0, 1, 3),
    slots: Sequence[int] | None = None,
    indexed: bool = True,
    dropout: float | None = None,
    dtype: torch.dtype = torch.float64,
    extra: int = 2,
) -> StreamCase:
    """A block of the kind `name`, and a stream in which each client has so many samples, `extra` have no client."""
    kind = KINDS[name]
    rng = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(dtype)

    def norm() -> Norm:
        return Norm(1 + draw(FEATURES) / 4, draw(FEATURES) / 4 if kind.norm == "layer" else None, 1e-6, kind.norm)

    queries, keys, inner = 3 * HEAD, kind.key_heads * HEAD, 40
    attention = (queries + 2 * keys,) if kind.merged else (queries, keys, keys)
    mlp = (inner, inner) if kind.activation == "swiglu" else (inner,)
    shapes = [(FEATURES, attention), (queries, (FEATURES,)), (FEATURES, mlp), (inner, (FEATURES,))]
    linears = [(inputs, width) for inputs, widths in shapes for width in widths]
    adapted = [number for number in range(len(linears)) if number not in kind.without]
    first_a = dict(zip(adapted, _starts([kind.rank * linears[n][0] for n in adapted]), strict=True))
    middle = sum(kind.rank * linears[n][0] for n in adapted)
    first_b = dict(zip(adapted, _starts([kind.rank * linears[n][1] for n in adapted], middle), strict=True))
    size = middle + sum(kind.rank * linears[n][1] for n in adapted)
    layers, first = [], 0
    for inputs, widths in shapes:
        columns = tuple(
            AdapterColumns(first_a[n], first_b[n], kind.rank, 0.7) if n in first_a else None
            for n in range(first, first + len(widths))
        )
        weight, bias = draw(sum(widths), inputs, scale=inputs**-0.5), draw(sum(widths))
        layers.append(AdaptedLayer(weight, bias, widths, columns, first))
        first += len(widths)
    scale1, scale2 = (draw(FEATURES) if kind.scaled else None for _ in range(2))
    block = StreamBlock(norm(), layers[0], layers[1], scale1, norm(), layers[2], kind.activation, layers[3], scale2)
    slots = [2 * number + 1 for number in range(len(samples))] if slots is None else slots
    bank = torch.full((max(slots) + 2, size), torch.nan, dtype=dtype)
    parts, upstream, order = [], [], []
    total = sum(samples) + (extra if indexed else 0)
    for count, slot in zip(samples, slots, strict=True):
        rng.manual_seed(100 + slot)
        bank[slot] = draw(size, scale=0.3)
        parts.append(draw(count, TOKENS, FEATURES))
        upstream.append(draw(count, TOKENS, FEATURES))
    rng.manual_seed(7)
    held, gradient = torch.cat(parts), torch.cat(upstream)
    places = torch.randperm(total, generator=rng)[: len(held)] if indexed else torch.arange(len(held))
    stream, grad = draw(total, TOKENS, FEATURES), draw(total, TOKENS, FEATURES)
    stream[places], grad[places] = held, gradient
    order = (places[:, None] * TOKENS + torch.arange(TOKENS)).flatten()
    drops: list[Dropout | None] = []
    if dropout is not None:
        for number in range(len(linears)):
            keys_of = torch.tensor([dropout_key(number, slot) for slot in slots])
            drops.append(Dropout(dropout, keys_of) if number in first_a else None)
    groups = RowGroups([count * TOKENS for count in samples], torch.tensor(slots))
    return StreamCase(stream, order if indexed else None, block, bank, groups, drops, grad, kind)


def _starts(lengths: Sequence[int], start: int = 0) -> list[int]:
    starts = []
    for length in lengths:
        starts.append(start)
        start += length
    return starts

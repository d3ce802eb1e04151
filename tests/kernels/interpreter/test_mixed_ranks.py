"""Clients of different ranks in one launch of `stream_block`: their factors are filled up with zeros to the largest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ..cases import assert_close
from ..stream_cases import KINDS, StreamCase, stream_case

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
RANKS = {"up to 32": (8, 1, 32, 3), "up to 128": (128, 1, 40, 17)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_clients_of_different_ranks(
    name: str, ranks: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, name, replace(KINDS[name], rank=max(ranks)))
    case = stream_case(name, samples=(2, 1, 0, 7), dtype=dtype)
    slots = case.groups.host_slots
    for slot, rank in zip(slots, ranks, strict=True):
        for padding in _padding(case, case.bank[slot], rank):
            padding.zero_()
    found = case.run()
    assert_close(found, case.expected(), TOLERANCE[dtype])
    for gradient, rank in zip(found["bank"], ranks, strict=True):
        assert all(not padding.any() for padding in _padding(case, gradient, rank))
    # Those of the clients with samples are not all zero.
    assert all(bool(found["bank"][group].any()) == (case.groups.sizes[group] > 0) for group in range(len(slots)))


@pytest.mark.parametrize("name", ["vit", "dinov2", "llama", "qwen3"])
def test_half_precision(name: str) -> None:
    case = stream_case(name, dtype=torch.float16, dropout=0.3)
    assert_close(case.run(), case.expected(), TOLERANCE[torch.float16])


def _padding(case: StreamCase, slot: Tensor, rank: int) -> Iterator[Tensor]:
    """Views of the rows of A and the columns of B beyond `rank`, of each adapter in a slot [slot size]."""
    block = case.block
    for layer in (block.attention_inputs, block.attention_output, block.mlp_inputs, block.mlp_output):
        yield from (a[0, rank:] for a in layer.lora_a(slot[None]))
        yield from (b[0, :, rank:] for b in layer.lora_b(slot[None]))

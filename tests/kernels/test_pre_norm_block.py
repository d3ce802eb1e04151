"""The op for a whole block against its reference: outputs, gradients of the stream and of the adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedra_kernels import (
    AdapterColumns,
    BlockAdapters,
    Dropout,
    FrozenLinear,
    Norm,
    PreNormBlock,
    RowGroups,
    pre_norm_block,
    pre_norm_block_reference,
)

FEATURES, WIDE, HEADS, RANK, TOKENS = 24, 40, 3, 2, 5
SIZES, SLOTS = [2, 0, 2, 3], [4, 1, 0, 3]
BANK_ROWS = 6
SAMPLES = torch.tensor([0, 2, 3, 5, 6, 8, 9])
RNG = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def make_block(*, merged: bool, scaled: bool, approximate: str = "none", fused: bool = False) -> PreNormBlock:
    def norm() -> Norm:
        return Norm(1 + draw(FEATURES) / 4, draw(FEATURES) / 4, 1e-6, "layer")

    def linear(outputs: int, inputs: int) -> FrozenLinear:
        return FrozenLinear(draw(outputs, inputs) / inputs**0.5, draw(outputs))

    inputs = [3 * FEATURES] if merged else [FEATURES] * 3
    return PreNormBlock(
        norm1=norm(),
        inputs=tuple(linear(outputs, FEATURES) for outputs in inputs),
        output=linear(FEATURES, FEATURES),
        scale1=draw(FEATURES) if scaled else None,
        norm2=norm(),
        fc1=linear(WIDE, FEATURES),
        fc2=linear(FEATURES, WIDE),
        scale2=draw(FEATURES) if scaled else None,
        heads=HEADS,
        attention_scale=(FEATURES // HEADS) ** -0.5,
        approximate="tanh" if approximate == "tanh" else "none",
        fused_attention=fused,
    )


def columns_of(block: PreNormBlock, *, a_first: bool, left_out: int | None = None) -> tuple[list[AdapterColumns], int]:
    """Where adapters lie in a slot: all A before all B, or each A before its B; with a gap for one left out."""
    shapes = [tuple(linear.weight.shape) for linear in block.linears]
    place: dict[tuple[int, str], int] = {}
    order = [(n, factor) for n in range(len(shapes)) for factor in "ab"]
    position = 0
    for n, factor in sorted(order, key=lambda entry: entry[1]) if a_first else order:
        place[n, factor] = position
        position += RANK * shapes[n][1 if factor == "a" else 0]
    found = [AdapterColumns(place[n, "a"], place[n, "b"], RANK, 1.5) for n in range(len(shapes))]
    if left_out is not None:
        found[left_out] = None  # type: ignore[call-overload]
    return found, position


def results(
    block: PreNormBlock,
    adapters: BlockAdapters,
    samples: Tensor | None,
    *,
    reference: bool,
    needs_hidden: bool = True,
    first_token_groups: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, gradient of the stream, gradients of the bank."""
    rng = torch.Generator().manual_seed(1)
    count = 10 if samples is not None else sum(SIZES)
    hidden, weights = (torch.randn(count, TOKENS, FEATURES, generator=rng, dtype=torch.float64) for _ in range(2))
    bank = torch.randn(BANK_ROWS, adapters.size, generator=rng, dtype=torch.float64).div_(3).requires_grad_()
    groups = RowGroups(SIZES, torch.tensor(SLOTS)).per_token(TOKENS)
    hidden.requires_grad_(needs_hidden)
    gradients = torch.zeros_like(bank)
    if reference:
        out = pre_norm_block_reference(hidden, samples, block, bank, adapters, groups, first_token_groups)
    else:
        out = pre_norm_block(
            hidden, samples, block, bank, gradients, adapters, groups, first_token_groups=first_token_groups
        )
    (out * weights).sum().backward()
    if reference:
        assert bank.grad is not None
        gradients = bank.grad
    return out.detach(), hidden.grad, gradients


def same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-11 * expected.abs().max())


@pytest.mark.parametrize("samples", [None, SAMPLES], ids=["all", "some"])
@pytest.mark.parametrize("fused", [False, True], ids=["products", "fused_attention"])
@pytest.mark.parametrize(
    ("merged", "scaled", "approximate", "a_first"),
    [(False, False, "none", True), (True, True, "tanh", True), (False, True, "none", False)],
)
def test_it_gives_what_the_reference_gives(
    merged: bool, scaled: bool, approximate: str, a_first: bool, fused: bool, samples: Tensor | None
) -> None:
    block = make_block(merged=merged, scaled=scaled, approximate=approximate, fused=fused)
    adapters = BlockAdapters(block, *columns_of(block, a_first=a_first))
    expected = results(block, adapters, samples, reference=True)
    for found, wanted in zip(results(block, adapters, samples, reference=False), expected, strict=True):
        assert found is not None
        assert wanted is not None
        assert same(found, wanted)


@pytest.mark.parametrize("samples", [None, SAMPLES], ids=["all", "some"])
@pytest.mark.parametrize("fused", [False, True], ids=["products", "fused_attention"])
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("first_token_groups", [1, 2, 3, len(SIZES)])
def test_of_samples_that_end_the_first_token_is_computed(
    first_token_groups: int, merged: bool, fused: bool, samples: Tensor | None
) -> None:
    block = make_block(merged=merged, scaled=merged, fused=fused)
    adapters = BlockAdapters(block, *columns_of(block, a_first=True))
    for needs_hidden in (True, False):
        options = {"first_token_groups": first_token_groups, "needs_hidden": needs_hidden}
        expected = results(block, adapters, samples, reference=True, **options)
        for found, wanted in zip(results(block, adapters, samples, reference=False, **options), expected, strict=True):
            assert (found is None) == (wanted is None)
            assert found is None or wanted is None or same(found, wanted)


def test_adapters_of_one_input_are_computed_together_where_they_can_be() -> None:
    block = make_block(merged=False, scaled=False)
    columns, size = columns_of(block, a_first=True)
    assert [len(of_input) for of_input in BlockAdapters(block, columns, size).shared] == [1, 1, 1, 1]
    assert [len(of_input) for of_input in BlockAdapters(block, columns, size, together=False).shared] == [3, 1, 1, 1]
    other_scale = [replace(columns[0], scale=0.5), *columns[1:]]
    assert [len(of_input) for of_input in BlockAdapters(block, other_scale, size).shared] == [2, 1, 1, 1]
    apart, size = columns_of(block, a_first=False)
    assert [len(of_input) for of_input in BlockAdapters(block, apart, size).shared] == [3, 1, 1, 1]


@pytest.mark.parametrize("left_out", [0, 1, 3, 5])
def test_a_linear_without_an_adapter(left_out: int) -> None:
    block = make_block(merged=False, scaled=False)
    adapters = BlockAdapters(block, *columns_of(block, a_first=True, left_out=left_out))
    assert not adapters.complete
    expected = results(block, adapters, SAMPLES, reference=True)
    for found, wanted in zip(results(block, adapters, SAMPLES, reference=False), expected, strict=True):
        assert found is not None
        assert wanted is not None
        assert same(found, wanted)


def test_frozen_factors_get_no_gradient() -> None:
    block = make_block(merged=False, scaled=False)
    columns, size = columns_of(block, a_first=True)
    for trains, kept in (("trains_a", slice(0, columns[0].first_b)), ("trains_b", slice(columns[0].first_b, size))):
        adapters = BlockAdapters(block, [replace(entry, **{trains: False}) for entry in columns], size)
        *_, gradients = results(block, adapters, SAMPLES, reference=False)
        *_, expected = results(block, adapters, SAMPLES, reference=True)
        assert not gradients[:, kept].any()
        others = torch.ones(size, dtype=torch.bool)
        others[kept] = False
        assert same(gradients[:, others], expected[:, others])


def test_adapters_get_gradients_where_the_stream_needs_none() -> None:
    block = make_block(merged=False, scaled=False)
    adapters = BlockAdapters(block, *columns_of(block, a_first=True))
    _, of_stream, gradients = results(block, adapters, SAMPLES, reference=False, needs_hidden=False)
    _, _, expected = results(block, adapters, SAMPLES, reference=True)
    assert of_stream is None
    assert same(gradients, expected)


def test_other_rows_of_the_bank_keep_their_gradients() -> None:
    block = make_block(merged=False, scaled=False)
    adapters = BlockAdapters(block, *columns_of(block, a_first=True))
    *_, gradients = results(block, adapters, SAMPLES, reference=False)
    filled = [slot for slot, size in zip(SLOTS, SIZES, strict=True) if size]
    assert [row for row in range(BANK_ROWS) if gradients[row].any()] == sorted(filled)


def test_what_does_not_fit_is_refused() -> None:
    block = make_block(merged=False, scaled=False)
    columns, size = columns_of(block, a_first=True)
    adapters = BlockAdapters(block, columns, size)
    hidden, bank = torch.zeros(2, TOKENS, FEATURES), torch.zeros(3, size)
    groups = RowGroups([2 * TOKENS], torch.tensor([2]))
    with pytest.raises(ValueError, match=r"columns: found 5, expected 6 as the block has Linears"):
        BlockAdapters(block, columns[:5], size)
    with pytest.raises(ValueError, match=r"bank: found shape \[3, 4\], expected"):
        pre_norm_block(hidden, None, block, bank[:, :4], None, adapters, groups)
    with pytest.raises(ValueError, match=r"groups: found 10 rows in sizes, expected 5"):
        pre_norm_block(hidden, torch.tensor([1]), block, bank, None, adapters, groups)
    with pytest.raises(ValueError, match=r"groups: found slot 2, expected slots below 2"):
        pre_norm_block(hidden, None, block, bank[:2], None, adapters, groups)
    with pytest.raises(ValueError, match=r"first_token_groups: found 2, expected 0 to 1 as there are groups"):
        pre_norm_block(hidden, None, block, bank, None, adapters, groups, first_token_groups=2)
    with pytest.raises(ValueError, match=r"dropout: found adapters that are computed together, expected BlockAdapters"):
        pre_norm_block(
            hidden, None, block, bank, None, adapters, groups, [Dropout(0.5, torch.zeros(1, dtype=torch.int64))] * 6
        )
    with pytest.raises(ValueError, match=r"dropout: found 1, expected 6"):
        pre_norm_block(hidden, None, block, bank, None, adapters, groups, [None])

"""`stream_block` by the kernels equals its reference in float64, and no client's results depend on the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton.runtime import interpreter as triton_interpreter

from fedra_kernels import stream_block

from ..cases import assert_close
from ..stream_cases import KINDS, TOKENS, stream_case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("name", KINDS)
def test_it_equals_the_reference(name: str, dropout: float | None) -> None:
    case = stream_case(name, dropout=dropout, dtype=torch.float32, samples=(4, 0, 1, 9))
    assert_close(case.run(), case.expected(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_all_rows_and_recomputed_blocks(name: str, dtype: torch.dtype) -> None:
    case = stream_case(name, dtype=dtype, indexed=False)
    expected = case.expected()
    assert_close(case.run(), expected, TOLERANCE[dtype])
    assert_close(case.run(recompute=True), expected, TOLERANCE[dtype])


def test_a_block_without_adapters_leaves_the_gradients_as_they_are() -> None:
    case = stream_case("vit", dtype=torch.float32)
    names = "attention_inputs", "attention_output", "mlp_inputs", "mlp_output"
    layers: Any = {name: getattr(case.block, name) for name in names}
    plain = {name: replace(layer, adapters=(None,) * len(layer.widths)) for name, layer in layers.items()}
    gradients = torch.zeros_like(case.bank)
    arguments = case.index, replace(case.block, **plain), case.attend, case.bank, gradients, case.groups
    stream_block(case.stream.clone().requires_grad_() * 1.0, *arguments).sum().backward()
    assert not gradients.any()


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_frozen_factor_gets_no_gradient(trains: str) -> None:
    case = stream_case("dinov2", dtype=torch.float32)
    assert_close(case.run(trains=trains), case.expected(trains=trains), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "dropout"), [("dinov2", 0.3), ("llama", None), ("high rank", None)])
def test_a_clients_results_do_not_depend_on_the_others(name: str, dropout: float | None, dtype: torch.dtype) -> None:
    options = {"dropout": dropout, "dtype": dtype, "extra": 0}
    together = stream_case(name, samples=(3, 9, 0, 2), **options)
    alone = stream_case(name, samples=(9,), slots=(3,), **options)
    found, expected = together.run(), alone.run()
    assert torch.equal(found["bank"][1], expected["bank"][0])
    assert together.index is not None
    assert alone.index is not None
    mine = slice(3 * TOKENS, 12 * TOKENS)
    for result in ("out", "stream"):
        rows, own = (values[result].flatten(0, 1) for values in (found, expected))
        assert torch.equal(rows[together.index[mine]], own[alone.index])


@pytest.mark.parametrize("name", ["dinov2", "llama", "high rank, gated"])
def test_the_order_of_the_programs_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = stream_case(name, dropout=0.3, dtype=torch.float32, samples=(4, 0, 1, 9))
    forwards = case.run()

    def backwards(*bounds: int) -> object:
        return reversed(range(*bounds)) if len(bounds) == 1 else range(*bounds)

    monkeypatch.setattr(triton_interpreter, "range", backwards, raising=False)
    for key, values in case.run().items():
        assert torch.equal(values, forwards[key]), key


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "dropout"), [("dinov2", None), ("llama", 0.3), ("high rank", None)])
def test_a_client_that_diverged_harms_nobody_else(name: str, dropout: float | None, wrong: float) -> None:
    case = stream_case(name, samples=(4, 2, 5), dropout=dropout, dtype=torch.float32)
    healthy, slot = case.run(), case.groups.host_slots[1]
    for adapter in (adapter for layer in case.block.layers for adapter in layer.present):
        case.bank[slot, [adapter.first_a + 1, adapter.first_b + 1]] = wrong
    found = case.run()
    for group in (0, 2):
        assert torch.equal(found["bank"][group], healthy["bank"][group])
    assert not found["bank"][1].isfinite().all()
    assert case.index is not None
    others = torch.ones(case.stream.flatten(0, 1).shape[0], dtype=torch.bool)
    others[case.index[4 * TOKENS : 6 * TOKENS]] = False
    for result in ("out", "stream"):
        assert torch.equal(found[result].flatten(0, 1)[others], healthy[result].flatten(0, 1)[others])

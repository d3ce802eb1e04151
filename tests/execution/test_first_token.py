"""Samples of which only the first token is computed in their last block get the same updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.execution import first_token, whole_block
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from tests.execution.test_assignments import ASKED, EXITS, early_exits, shared_end
from tests.execution.test_exactness import assert_same_rounds
from tests.execution.test_stand_ins import gaps_before_exits
from tests.tiny import DEPTH, make_samples
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_token, "_WORTHWHILE", 1.0)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many groups of how many end, in each call of the op in which some do."""
    found: list[tuple[int, int]] = []
    op = whole_block.pre_norm_block

    def record(*arguments: Any, first_token_groups: int) -> Tensor:
        if first_token_groups:
            found.append((first_token_groups, len(arguments[6])))
        return op(*arguments, first_token_groups=first_token_groups)

    monkeypatch.setattr(whole_block, "pre_norm_block", record)
    return found


def model_of(setting: Setting) -> SweepModel:
    executor = setting.executor(3)
    assert isinstance(executor, SweepExecutor)
    return executor.model


@pytest.mark.parametrize(
    ("family", "found"),
    [("vit", True), ("deit", True), ("timm_vit", False), ("dinov2", False), ("siglip", False), ("gpt2", False)],
)
def test_it_is_found_where_nothing_reads_other_tokens(family: str, found: bool) -> None:
    assert (model_of(make_setting(family, SGD, fuse_blocks=True)).fewest_first_token_samples == 1) == found


def test_it_takes_blocks_that_one_op_computes() -> None:
    assert model_of(make_setting("vit", SGD)).fewest_first_token_samples is None


@pytest.mark.parametrize("family", ["vit", "deit"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_sweep_equals_sequential(family: str, dropout: float, ended: list[tuple[int, int]]) -> None:
    setting = make_setting(family, ADAMW, dropout=dropout, fuse_blocks=True)
    assert_same_rounds(setting, lanes=4, count=2, tolerance=1e-8)
    assert {first_token_groups == all_of_them for first_token_groups, all_of_them in ended} == {False, True}


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.__name__)
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_with_other_assignments(asked: Callable[[Allocation], Assignment], checkpoint_blocks: bool) -> None:
    setting = make_setting("vit", SGD, dropout=0.3, fuse_blocks=True)
    exits = len(EXITS) if asked in (early_exits, shared_end) else 1
    setting = replace(setting, assignment=asked, exits=exits, checkpoint_blocks=checkpoint_blocks)
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)


@pytest.mark.parametrize("exits", [False, True])
def test_with_stand_ins(exits: bool, ended: list[tuple[int, int]]) -> None:
    setting = replace(make_setting("vit", SGD, fuse_blocks=True), stand_ins=True)
    if exits:
        setting = replace(setting, assignment=gaps_before_exits, exits=len(EXITS))
    assert_same_rounds(setting, lanes=4, count=2, tolerance=1e-8)
    assert ended


def test_a_block_in_which_too_few_end_is_computed_at_once(
    monkeypatch: pytest.MonkeyPatch, ended: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(first_token, "_WORTHWHILE", 1e12)
    assert_same_rounds(make_setting("vit", SGD, fuse_blocks=True), lanes=4, count=1, tolerance=1e-8)
    assert ended
    assert all(first_token_groups == all_of_them for first_token_groups, all_of_them in ended)


def test_who_watches_the_blocks_sees_all_tokens() -> None:
    setting = make_setting("vit", SGD, fuse_blocks=True)
    inputs = make_samples("vit", 2).inputs(torch.arange(2), torch.device("cpu"), setting.foundation.dtype)
    adapters = setting.state().adapters
    seen: list[Tensor] = []
    for model in (model_of(setting), model_of(replace(setting, fuse_blocks=False))):
        model.watch_blocks(inputs, adapters, lambda block, before, after: seen.append(after))
    assert len(seen) == 2 * DEPTH
    for found, expected in zip(seen[:DEPTH], seen[DEPTH:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_features_of_groups_are_those_of_all_tokens() -> None:
    setting = make_setting("vit", SGD, fuse_blocks=True)
    model = model_of(setting)
    inputs = make_samples("vit", 6).inputs(torch.arange(6), torch.device("cpu"), setting.foundation.dtype)
    bank = setting.state().adapters.repeat(3, 1)
    held = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=np.bool_)
    slots = np.where(held, np.arange(3 * DEPTH).reshape(3, DEPTH), -1)
    with torch.no_grad():
        found, expected = (model.features_of(inputs, bank, slots, all_tokens=every) for every in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

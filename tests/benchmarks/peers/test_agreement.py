"""Contestants have done equal work, or it is noticed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers.agreement import compare, unchanged
from benchmarks.peers.command import check
from benchmarks.peers.processes import ContestantError
from benchmarks.peers.work import State, mean_over_holders
from tests.benchmarks.peers.standings import OTHER_WORK, standing

GENERATOR = torch.Generator().manual_seed(0)


def drawn(scale: float) -> State:
    return {name: scale * torch.randn(20, 30, generator=GENERATOR) for name in ("blocks.0.q.lora_A", "head.weight")}


INITIAL, CHANGE = drawn(1.0), drawn(1e-3)


def after(change: State) -> State:
    return {name: value + change[name] for name, value in INITIAL.items()}


@pytest.mark.parametrize(
    ("dtype", "noise", "holds"),
    [("float32", 1e-7, True), ("float32", 5e-6, False), ("bfloat16", 5e-5, True), ("bfloat16", 2e-4, False)],
)
def test_changes_are_compared_not_values(dtype: str, noise: float, holds: bool) -> None:
    """All of these noises are below a thousandth of the values."""
    noisy = {name: value + noise * torch.randn(value.shape, generator=GENERATOR) for name, value in CHANGE.items()}
    assert compare(INITIAL, after(CHANGE), after(noisy), dtype).holds is holds


def test_a_round_that_did_nothing_or_lacks_a_tensor_is_other_work() -> None:
    lacking = {name: value for name, value in after(CHANGE).items() if name != "head.weight"}
    for dtype in ("float32", "bfloat16"):
        assert not compare(INITIAL, after(CHANGE), INITIAL, dtype).holds
        assert not compare(INITIAL, after(CHANGE), lacking, dtype).holds


def test_a_round_without_steps_changes_nothing() -> None:
    assert unchanged(INITIAL, {name: value * (1 + 1e-7) for name, value in INITIAL.items()}).holds
    assert not unchanged(INITIAL, after(CHANGE)).holds


def test_the_command_fails_where_a_contestant_has_done_other_work() -> None:
    equal, other = standing("one", 1.0), standing("another", 1.0, agreement=OTHER_WORK)
    check({"vit192": [equal, equal]})
    with pytest.raises(ContestantError, match=r"vit192: found a change of another in float32 that differs .* 0\.5 "):
        check({"vit192": [equal, other]})


def test_a_tensor_is_averaged_over_those_who_have_it() -> None:
    state = {name: torch.zeros(2) for name in ("a", "b", "c")}
    updates = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}]
    mean = {name: value.tolist() for name, value in mean_over_holders(state, updates).items()}
    assert mean == {"a": [2.0, 3.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}

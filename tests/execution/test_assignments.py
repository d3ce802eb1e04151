"""Whatever a method asks of its participants, the sweep gives the update of a sub-model trained alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.allocation import Allocation, prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.hetlora import RankPenalty
from tests.execution.test_exactness import assert_same_rounds
from tests.tiny import DEPTH
from tests.tiny_federation import ADAMW, SGD, Tensors, make_setting

RANKS = np.array([3, 1, 2, 3, 1, 2])
EXITS = (0, 2, 3)


def some_blocks_trained(allocation: Allocation) -> Assignment:
    return Assignment(held=np.ones_like(allocation), trained=allocation)


def only_b_trained(allocation: Allocation) -> Assignment:
    return Assignment(allocation, factors="B")


def only_a_trained(allocation: Allocation) -> Assignment:
    return Assignment(allocation, factors="A")


def mixed_ranks(allocation: Allocation) -> Assignment:
    return Assignment(allocation, ranks=RANKS)


def early_exits(allocation: Allocation) -> Assignment:
    depths = np.array([4, 1, 3, 1, 1, 1])
    return Assignment(prefix_allocation(depths, DEPTH), exits=EXITS, distillation=0.7)


def shared_end(allocation: Allocation) -> Assignment:
    return Assignment(allocation, exits=EXITS[:2], shared_end=True, distillation=0.7)


def something_kept(allocation: Allocation) -> Assignment:
    def hand_out(client: int, blocks: NDArray[np.int64], slots: Tensor) -> None:
        own = np.random.default_rng(client).normal(scale=0.1, size=(DEPTH, slots.shape[1]))
        half = slots.shape[1] // 2
        slots[:, half:] = torch.from_numpy(own[blocks])[:, half:]

    return Assignment(allocation, hand_out=hand_out, ranks=RANKS)


def penalised_ranks(allocation: Allocation) -> Assignment:
    return Assignment(allocation, ranks=RANKS, terms=(RankPenalty(keep_ratio=0.7, weight=0.5),))


ASKED = [
    *(penalised_ranks, some_blocks_trained, only_b_trained, only_a_trained, mixed_ranks, something_kept),
    *(early_exits, shared_end),
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.__name__)
@pytest.mark.parametrize("fuse_blocks", [False, True], ids=["plain", "fused"])
def test_sweep_equals_sequential(asked: Callable[[Allocation], Assignment], fuse_blocks: bool) -> None:
    setting = make_setting("vit", SGD, dropout=0.3, fuse_blocks=fuse_blocks)
    setting = replace(setting, assignment=asked, exits=len(EXITS) if asked in (early_exits, shared_end) else 1)
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.__name__)
def test_sweep_equals_sequential_with_adamw_and_a_proximal_term(asked: Callable[[Allocation], Assignment]) -> None:
    setting = make_setting("bert", replace(ADAMW, proximal_mu=0.5))
    setting = replace(setting, assignment=asked, exits=len(EXITS) if asked in (early_exits, shared_end) else 1)
    assert_same_rounds(setting, lanes=4, count=2, tolerance=1e-8)


def test_a_factor_that_is_not_trained_stays() -> None:
    setting = replace(make_setting("vit", ADAMW), assignment=only_b_trained)
    (trained,) = setting.rounds(3)
    for tensors in trained.updates.values():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, trained.before[name]) == name.endswith("lora_A"), name


def test_a_client_of_low_rank_returns_zeros_beyond_it() -> None:
    setting = replace(make_setting("vit", ADAMW), assignment=mixed_ranks)
    (trained,) = setting.rounds(6)
    for client, rank in enumerate(RANKS):
        for name, factor in trained.updates[client].items():
            if "lora" in name:
                by_rank = factor if name.endswith("lora_A") else factor.T
                assert by_rank[:rank].any(1).all()
                assert not by_rank[rank:].any()


def test_a_participant_has_the_exits_whose_blocks_it_holds() -> None:
    setting = replace(make_setting("vit", SGD), assignment=early_exits, exits=len(EXITS))
    (trained,) = setting.rounds(6)
    assert classifiers(trained.updates[0]) == {"exits.0", "exits.1", "head"}
    assert classifiers(trained.updates[2]) == {"exits.0", "exits.1"}
    assert classifiers(trained.updates[1]) == {"exits.0"}


def test_a_shared_classifier_follows_the_last_block_whatever_the_depth() -> None:
    held = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]], dtype=bool)
    setting = replace(make_setting("vit", SGD), assignment=lambda _: shared_end(held), exits=len(EXITS))
    (trained,) = setting.rounds(6)
    before_the_end = [{"exits.0", "exits.1"}, {"exits.0"}, set(), set(), {"exits.0"}, set()]
    for client, early in enumerate(before_the_end):
        assert classifiers(trained.updates[client]) == early | {"head"}


def classifiers(tensors: Tensors) -> set[str]:
    return {name.removesuffix(".bias") for name in tensors if name.endswith(".bias")}

"""Updates that are not finite are noticed, by either executor, and nothing of them reaches another client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import TrainingConfig
from fedra_engine.execution.banks import clip_factors
from fedra_engine.execution.executor import Executor
from fedra_engine.federation.aggregation import Aggregator, Averaging
from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from tests.execution.test_assignments import EXITS, early_exits, penalised_ranks, something_kept
from tests.execution.test_exactness import assert_same_change
from tests.tiny_federation import ADAMW, SGD, Setting, Tensors, make_setting

BAD = 2
"""Holds three blocks, has most samples, and so the first rows of the sweep's batches."""
GOOD = np.array([0, 1, 3, 4, 5])
EXECUTORS = pytest.mark.parametrize("lanes", [None, 3], ids=["sequential", "sweep"])


@dataclass(frozen=True)
class Trained:
    """What a round gave: every client's update, norm and loss, and the global tensors before and after."""

    updates: dict[int, Tensors]
    norms: dict[int, float]
    losses: dict[int, float]
    before: Tensors
    after: Tensors


def spoilt(setting: Setting, lanes: int | None, value: float) -> Executor:
    """An executor to whose client `BAD` one pixel of every sample is `value`."""
    executor = setting.executor(lanes)
    (pixels,) = executor.samples.tensors.values()  # type: ignore[attr-defined]
    pixels[setting.clients.samples[BAD], 0, 0, 0] = value
    return executor


def train(setting: Setting, executor: Executor, participants: NDArray[np.int64]) -> Trained:
    state = setting.state()
    aggregator, updates, norms, losses = Aggregator(state), {}, {}, {}
    for some in executor.train(*setting.work(0, participants), state):
        aggregator.add(some)
        assert some.norms is not None
        norms |= dict(zip(some.clients.tolist(), some.norms.tolist(), strict=True))
        losses |= dict(zip(some.clients.tolist(), some.losses.tolist(), strict=True))
        updates |= {client: setting.named(update, state) for _, client, update in some.of_good_clients()}
    return Trained(updates, norms, losses, setting.named_state(state), setting.named_state(aggregator.result()))


def is_left_out(setting: Setting, lanes: int | None, value: float) -> None:
    executor = spoilt(setting, lanes, value)
    found = train(setting, executor, np.arange(len(setting.clients)))
    expected = train(setting, executor, GOOD)
    assert not np.isfinite(found.norms[BAD])
    assert set(found.updates) == set(expected.updates) == set(GOOD.tolist())
    for client in GOOD.tolist():
        assert found.norms[client] == pytest.approx(expected.norms[client], rel=1e-8)
        assert_same_change(found.updates[client], expected.updates[client], expected.before, tolerance=1e-8)
    assert_same_change(found.after, expected.after, expected.before, tolerance=1e-8)


@EXECUTORS
@pytest.mark.parametrize("asked", [Assignment, early_exits, penalised_ranks], ids=lambda asked: asked.__name__)
def test_a_client_with_nan_is_left_out(asked: Callable[[Allocation], Assignment], lanes: int | None) -> None:
    exits = len(EXITS) if asked is early_exits else 1
    setting = replace(make_setting("vit", SGD, dropout=0.3), assignment=asked, exits=exits)
    is_left_out(setting, lanes, torch.nan)


def test_a_client_with_nan_is_left_out_where_blocks_are_fused() -> None:
    is_left_out(make_setting("vit", SGD, fuse_blocks=True), 3, torch.nan)


@EXECUTORS
@pytest.mark.parametrize("training", [SGD, ADAMW, replace(ADAMW, clip_norm=None)], ids=["sgd", "adamw", "unclipped"])
def test_a_client_with_an_infinite_pixel_is_left_out(training: TrainingConfig, lanes: int | None) -> None:
    is_left_out(make_setting("vit", training), lanes, torch.inf)


def norms(setting: Setting, lanes: int | None) -> dict[int, float]:
    return train(setting, setting.executor(lanes), np.arange(len(setting.clients))).norms


def with_head_times(setting: Setting, factor: float) -> Setting:
    """The same, but gradients of the adapters are about `factor` times as large."""

    @dataclass
    class Steep(Setting):
        def state(self):  # type: ignore[no-untyped-def]
            state = super().state()
            return replace(state, heads=state.heads * factor)

    return Steep(**vars(setting))


def steep_norms(training: TrainingConfig, dtype: torch.dtype, factor: float, lanes: int | None) -> list[float]:
    """Norms of the clients after one step from heads times `factor`; without those who have nothing to learn."""
    one_step = replace(training, max_local_steps=1)
    surer = with_head_times(make_setting("vit", one_step), 1e6)
    losses = train(surer, surer.executor(lanes), np.arange(len(surer.clients))).losses
    # Who is right of all samples has no gradient, however large the heads are.
    wrong = [client for client, loss in losses.items() if loss > 1]
    assert len(wrong) > 2
    found = norms(with_head_times(make_setting("vit", one_step, dtype=dtype), factor), lanes)
    return [found[client] for client in wrong]


@EXECUTORS
def test_gradients_whose_squares_overflow_are_clipped(lanes: int | None) -> None:
    """Their norm is finite; taken in float32 it would be infinite, the factor 0, and nobody would learn."""
    found = steep_norms(replace(SGD, weight_decay=0.0), torch.float32, 1e25, lanes)
    assert found == pytest.approx([SGD.lr * 0.5] * len(found), rel=0.2)


@EXECUTORS
@pytest.mark.parametrize("training", [SGD, replace(ADAMW, clip_norm=None)], ids=["infinite", "adamw's squares"])
def test_gradients_too_large_for_a_step_make_a_bad_update(training: TrainingConfig, lanes: int | None) -> None:
    """Not one in which nothing has changed."""
    factor = 1e38 if training is SGD else 1e25
    assert not np.isfinite(steep_norms(training, torch.float32, factor, lanes)).any()


@EXECUTORS
def test_a_client_that_overflows_in_float16_is_noticed(lanes: int | None) -> None:
    assert not np.isfinite(steep_norms(SGD, torch.float16, 1e9, lanes)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clip_factors_are_torchs(dtype: torch.dtype) -> None:
    norms = torch.tensor([0.0, 0.1, 0.5, 2.0, 1e15], dtype=torch.float64)
    found = clip_factors(norms.square(), SGD, dtype)
    for norm, factor in zip(norms.tolist(), found.tolist(), strict=True):
        parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        parameter.grad = torch.tensor(norm, dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        assert norm * factor == pytest.approx(float(parameter.grad), rel=1e-6)


@EXECUTORS
def test_norms_are_those_of_the_change_of_what_was_handed_out(lanes: int | None) -> None:
    """Not of the difference to the global state, which clients of a lower rank, say, never had."""
    setting = replace(make_setting("vit", replace(SGD, lr=1e-9)), assignment=something_kept)
    assert 0 < max(norms(setting, lanes).values()) < 1e-6


def test_bad_updates_change_no_sum_whatever_their_weight() -> None:
    setting = make_setting("vit", SGD)
    state = setting.state()
    updates = parts(setting, spoilt(setting, 1, torch.nan))
    for weighting in ("uniform", "samples"):
        with_all, without = (Aggregator(state, Averaging(weighting, deterministic=True)) for _ in range(2))
        for client, of_one in updates:
            with_all.add(of_one)
            if client != BAD:
                without.add(of_one)
        assert all(map(torch.equal, with_all.sums(), without.sums()))
        assert torch.isfinite(torch.stack([total.sum() for total in with_all.sums()])).all()


def parts(setting: Setting, executor: Executor) -> list[tuple[int, ClientUpdates]]:
    """Each client's updates, copied out of the banks."""

    def copies() -> Iterator[tuple[int, ClientUpdates]]:
        for updates in executor.train(*setting.work(0, np.arange(len(setting.clients))), setting.state()):
            owned: dict[str, Tensor] = {name: getattr(updates, name).clone() for name in ("adapters", "heads")}
            yield int(updates.clients[0]), replace(updates, **owned)

    return list(copies())

"""Stand-ins: fitted as a regression computed by hand, and the same in the sweep as in sub-models trained alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedra_engine.config import MethodConfig, TrainingConfig
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.sequential import Submodel
from fedra_engine.execution.stand_ins import StandInFit, _Moments
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.federation.allocation import Allocation, prefix_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.models.stand_ins import StandIns
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.processes import Processes
from tests.execution.test_assignments import EXITS
from tests.execution.test_exactness import assert_same_rounds
from tests.tiny import DEPTH, make_samples
from tests.tiny_federation import ADAMW, SAMPLE_COUNTS, SGD, Round, Setting, make_setting

FIT = MethodConfig(stand_in="linear", stand_in_rank=3, stand_in_ridge=0.02, stand_in_samples=12)


def replaced(family: str, training: TrainingConfig = SGD, **settings: Any) -> Setting:
    return replace(make_setting(family, training, **settings), stand_ins=True)


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert", "llama", "llama_lm", "timm_mixer", "gpt2", "qwen2"])
def test_sweep_equals_sequential(family: str) -> None:
    assert_same_rounds(replaced(family), lanes=3, count=2, tolerance=1e-8)


@pytest.mark.parametrize("family", ["vit", "dinov2", "llama"])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_fused_and_checkpointed_blocks_with_dropout(family: str, checkpoint_blocks: bool) -> None:
    setting = replaced(family, ADAMW, dropout=0.3, fuse_blocks=True)
    assert_same_rounds(replace(setting, checkpoint_blocks=checkpoint_blocks), lanes=4, count=2, tolerance=1e-8)


def gaps_before_exits(allocation: Allocation) -> Assignment:
    held = np.array(
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=np.bool_
    )
    return Assignment(held, exits=EXITS, distillation=0.7)


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_early_exits(fuse_blocks: bool) -> None:
    setting = replace(replaced("vit", fuse_blocks=fuse_blocks), assignment=gaps_before_exits, exits=len(EXITS))
    assert_same_rounds(setting, lanes=4, count=2, tolerance=1e-8)


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_a_classifier_that_all_share_at_the_end(fuse_blocks: bool) -> None:
    def shared(allocation: Allocation) -> Assignment:
        return replace(gaps_before_exits(allocation), exits=EXITS[:-1], shared_end=True)

    setting = replace(replaced("vit", fuse_blocks=fuse_blocks), assignment=shared, exits=len(EXITS))
    _, assignment = setting.work(0, np.arange(len(SAMPLE_COUNTS)))
    assert np.array_equal(assignment.replaced_blocks, ~assignment.held)
    assert_same_rounds(setting, lanes=4, count=2, tolerance=1e-8)


def test_blocks_after_the_last_exit_are_not_replaced() -> None:
    assignment = gaps_before_exits(np.empty(0)).with_stand_ins(np.arange(DEPTH))
    assert assignment.replaced_blocks.tolist() == [
        [False, False, False, False],
        [False, False, False, False],
        [False, True, False, False],
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, False],
    ]


def test_blocks_outside_the_global_model_are_not_replaced() -> None:
    held = prefix_allocation(np.array([1, 2]), DEPTH)
    replaced_blocks = Assignment(held).with_stand_ins(np.arange(3)).replaced_blocks
    assert replaced_blocks.tolist() == [[False, True, True, False], [False, False, True, False]]


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_a_block_that_nobody_holds_is_replaced_for_all(fuse_blocks: bool) -> None:
    held = np.repeat(np.array([[True, False, True, False]]), len(SAMPLE_COUNTS), axis=0)
    setting = replace(replaced("vit", fuse_blocks=fuse_blocks), assignment=lambda _: Assignment(held))
    assert_same_rounds(setting, lanes=3, count=1, tolerance=1e-8)


def test_maps_change_what_clients_learn() -> None:
    (plain,), (mapped,) = make_setting("vit", SGD).rounds(6), replaced("vit").rounds(6)
    assert all(differ(plain, mapped, client) for client in (1, 2, 3, 4, 5))
    # It holds all blocks.
    assert not differ(plain, mapped, 0)


def differ(one: Round, other: Round, client: int) -> bool:
    return any(not torch.equal(tensor, other.updates[client][name]) for name, tensor in one.updates[client].items())


def test_no_map_is_applied_where_everybody_holds_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedra_engine.execution.sweep_block.low_rank_add", None)
    setting = replaced("vit")
    everything = np.ones((len(SAMPLE_COUNTS), DEPTH), dtype=np.bool_)
    (found,) = replace(setting, assignment=lambda _: Assignment(everything)).rounds(3)
    assert len(found.updates) == len(SAMPLE_COUNTS)


@pytest.mark.parametrize("family", ["vit", "bert", "timm_mixer"])
@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_maps_are_the_ridge_regression_of_residuals_cut_to_their_rank(family: str, fuse_blocks: bool) -> None:
    setting = make_setting(family, SGD, fuse_blocks=fuse_blocks)
    state, fit = setting.state(), fitting(setting)
    found = fit(state, round=0)
    inputs = make_samples(family, sum(SAMPLE_COUNTS)).inputs(drawn(fit), torch.device("cpu"), torch.float64)
    for block, (x, y) in enumerate(residuals(setting, inputs)):
        mean, down, up, bias = by_hand(x, y, FIT)
        torch.testing.assert_close(found.mean[block], mean)
        torch.testing.assert_close(found.bias[block], bias)
        # Singular vectors have no sign.
        torch.testing.assert_close(found.down[block] @ found.up[block], down @ up)


def fitting(setting: Setting, config: MethodConfig = FIT) -> StandInFit:
    executor: Executor = setting.executor(3)
    assert isinstance(executor, SweepExecutor)
    rows = np.arange(sum(SAMPLE_COUNTS))
    return StandInFit(setting.foundation, executor.model, executor.samples, rows, config, 0, Processes.alone())


def drawn(fit: StandInFit) -> Tensor:
    """The samples that `fit` draws before the first round, seen as it sees them."""
    seen: list[Tensor] = []
    original = fit.samples.inputs
    spy = SimpleNamespace(lengths=None, inputs=lambda rows, *others: [seen.append(rows), original(rows, *others)][1])
    replace(fit, samples=spy)(GlobalState(*nothing(fit)), round=0)
    return torch.cat(seen)


def nothing(fit: StandInFit) -> tuple[Tensor, Tensor]:
    foundation = fit.foundation
    return torch.zeros(DEPTH, foundation.adapter_layout.size, dtype=torch.float64), foundation.initial_heads()


def residuals(setting: Setting, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the blocks of the model with its adapters, and what the blocks add; without padding."""
    held = np.ones((1, DEPTH), dtype=np.bool_)
    submodel = Submodel(setting.foundation, setting.lora, Assignment(held), 0, 0, setting.state())
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(block: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        mask = inputs.get("attention_mask", torch.ones(before.shape[:2])).bool()
        pairs.append((before[mask], (after - before)[mask]))

    for block in submodel.held:
        block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        submodel.logits(inputs)
    return pairs


def by_hand(x: Tensor, y: Tensor, config: MethodConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centred, target = x - x.mean(0), y - y.mean(0)
    penalty = config.stand_in_ridge * centred.square().sum() / x.shape[1]
    # Ridge regression is least squares with rows √λ I.
    rows = torch.cat([centred, penalty.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])
    matrix = torch.linalg.lstsq(rows, torch.cat([target, torch.zeros_like(x[:1]).repeat(x.shape[1], 1)])).solution
    _, singular, right = torch.linalg.svd(centred @ matrix, full_matrices=False)
    best = right[: config.stand_in_rank]
    assert singular[config.stand_in_rank] < singular[config.stand_in_rank - 1]
    return x.mean(0), matrix @ best.T, best, y.mean(0)


def test_a_map_of_full_rank_replaces_a_linear_block_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(8, 8, generator=rng).double(), 5 + torch.randn(100, 8, generator=rng).double()
    moments = _Moments.zeros(8, torch.device("cpu"))
    for part in x.split(30):
        moments.add(part, part @ matrix + 1)
    maps = StandIns(*(tensor[None] for tensor in moments.fit(rank=8, ridge=1e-12)))
    ((down, up, shift, bias),) = maps.maps(torch.float64)
    torch.testing.assert_close((x @ down + shift) @ up + bias, x @ matrix + 1)


def test_a_map_of_rank_0_adds_what_the_block_does_on_average() -> None:
    setting = make_setting("vit", SGD)
    fit, state = fitting(setting, replace(FIT, stand_in_rank=0)), setting.state()
    constants, maps = fit(state, round=0), fitting(setting)(state, round=0)
    assert constants.down.shape == (DEPTH, 16, 0)
    assert constants.up.shape == (DEPTH, 0, 16)
    torch.testing.assert_close(constants.bias, maps.bias)
    assert constants.bias.abs().max() > 0.01


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_sweep_equals_sequential_with_constants(fuse_blocks: bool) -> None:
    assert_same_rounds(
        replace(replaced("vit", fuse_blocks=fuse_blocks), stand_in_rank=0), lanes=3, count=2, tolerance=1e-8
    )


def test_rounding_of_the_shift_is_made_good_by_the_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, down, up, bias = (torch.randn(2, *shape, generator=rng) for shape in ((64,), (64, 4), (4, 64), (64,)))
    mean = mean * 300
    exact, rounded = (StandIns(mean, down, up, bias).maps(dtype)[0] for dtype in (torch.float64, torch.bfloat16))
    x = mean[0].bfloat16().double()

    def added(map: Any) -> Tensor:
        return (x @ map.down.double() + map.shift.double()) @ map.up.double() + map.bias.double()

    # The map of rounded factors, computed without further rounding.
    wide = (x - mean[0].double()) @ rounded.down.double() @ rounded.up.double() + bias[0].double()
    assert (added(rounded) - wide).abs().max() < 0.02
    shift_alone = (x @ rounded.down.double() + rounded.shift.double()) @ rounded.up.double() + bias[0].double()
    assert (shift_alone - wide).abs().max() > 0.5
    assert torch.allclose(
        added(exact), (x - mean[0].double()) @ (down[0] @ up[0]).double() + bias[0].double(), atol=1e-3
    )


def test_too_high_a_rank_is_refused() -> None:
    setting = make_setting("vit", SGD)
    with pytest.raises(InputError, match=r"stand_in_rank: found 17 with a model of 16 features, expected no more"):
        fitting(setting, replace(FIT, stand_in_rank=17))(setting.state(), round=0)


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    setting = make_setting("vit", SGD)
    fit, state = fitting(setting), setting.state()
    state.adapters[1] = torch.inf
    with pytest.raises(InputError, match=r"method.stand_in: found hidden states that are not finite"):
        fit(state, round=0)


def test_tokens_that_are_all_alike_give_a_map_that_does_nothing() -> None:
    moments = _Moments.zeros(4, torch.device("cpu"))
    moments.add(torch.full((10, 4), 1000 / 3).double(), torch.ones(10, 4).double())
    for ridge in (0.01, 1e-300):
        _, down, up, bias = moments.fit(rank=2, ridge=ridge)
        assert (down @ up).abs().max() < 1e-3
        assert bias.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("every", "due"), [(None, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4])])
def test_maps_are_fitted_again_every_so_many_rounds(every: int | None, due: list[int]) -> None:
    fit = fitting(make_setting("vit", SGD), replace(FIT, stand_in_refit=every))
    assert [round for round in range(6) if fit.is_due(round)] == due

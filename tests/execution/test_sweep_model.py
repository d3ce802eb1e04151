"""The sweep's model on its own: what it computes for groups of samples, and when a pass is over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedra_engine.config import LoraConfig
from fedra_engine.execution import sweep_model
from fedra_engine.execution.plan import ExitCopy
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.execution.whole_block import WholeBlock
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.foundation import Foundation, cut_to_blocks, replace_module
from tests.tiny import DEPTH, TARGETS, make_samples, make_tiny

CPU = torch.device("cpu")
SAMPLES = make_samples("vit", 6)
ALL = np.arange(DEPTH)[None]


def inputs(count: int) -> dict[str, Tensor]:
    return SAMPLES.inputs(torch.arange(count), CPU, torch.float64)


@pytest.fixture(scope="module")
def foundation() -> Foundation:
    return make_tiny("vit", LoraConfig(rank=3, target_modules=TARGETS["vit"]), torch.float64)


@pytest.fixture(scope="module")
def model(foundation: Foundation) -> SweepModel:
    return SweepModel(foundation, inputs, fuse_blocks=False)


@pytest.fixture
def adapters(foundation: Foundation) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(2 * DEPTH, foundation.adapter_layout.size, generator=generator, dtype=torch.float64)


def cut_features(foundation: Foundation, blocks: range, count: int) -> Tensor:
    """Of the model that has these blocks only."""
    cut = cut_to_blocks(foundation, blocks)
    replace_module(cut, foundation.head_path, nn.Identity())
    features: Tensor = cut(**inputs(count)).logits
    return features


def running(model: SweepModel) -> bool:
    return model._context.running is not None


def test_without_adapters_a_group_has_the_features_of_its_blocks(foundation: Foundation, model: SweepModel) -> None:
    slots = np.stack([np.arange(DEPTH), np.full(DEPTH, -1)])
    slots[1, 2:] = np.arange(2, DEPTH) + DEPTH
    found = model.features_of(inputs(6), torch.zeros(2 * DEPTH, foundation.adapter_layout.size), slots)
    torch.testing.assert_close(found[:3], cut_features(foundation, range(DEPTH), 6)[:3])
    torch.testing.assert_close(found[3:], cut_features(foundation, range(2, DEPTH), 6)[3:])


def test_a_group_meets_its_own_adapters(model: SweepModel, adapters: Tensor) -> None:
    slots = np.arange(2 * DEPTH).reshape(2, DEPTH)
    together = model.features_of(inputs(4), adapters, slots)
    first, second = (model.features_of(inputs(4), adapters, group[None]) for group in slots)
    torch.testing.assert_close(together, torch.cat([first[:2], second[2:]]))
    assert (first - second).abs().max() > 1e-6


def test_the_scale_multiplies_the_product(foundation: Foundation, model: SweepModel, adapters: Tensor) -> None:
    scaled = adapters.clone()
    scaled[:, foundation.adapter_layout.columns("B")] *= 3
    lora = LoraConfig(rank=3, alpha=3 * LoraConfig().alpha, target_modules=TARGETS["vit"])
    found = SweepModel(make_tiny("vit", lora, torch.float64), inputs, fuse_blocks=False)
    torch.testing.assert_close(found.features_of(inputs(2), adapters, ALL), model.features_of(inputs(2), scaled, ALL))


def test_a_copy_has_the_state_of_its_source_at_an_exit(foundation: Foundation, model: SweepModel) -> None:
    slots = np.stack([np.arange(DEPTH), np.full(DEPTH, -1)])
    twice = {name: tensor.repeat(2, 1, 1, 1) for name, tensor in inputs(2).items()}
    nothing = torch.zeros(DEPTH, foundation.adapter_layout.size)
    found = model.features_of(twice, nothing, slots, copies=[ExitCopy(1, 1, 0)])
    torch.testing.assert_close(found[:2], cut_features(foundation, range(DEPTH), 2))
    torch.testing.assert_close(found[2:], cut_features(foundation, range(2), 2))


def test_backward_adds_the_gradients_of_the_rows_in_the_pass(model: SweepModel, adapters: Tensor) -> None:
    gradients = torch.zeros_like(adapters)
    model.backward(model.features_of(inputs(2), adapters, ALL, gradients)[:, 0].sum())
    assert gradients[:DEPTH].any(dim=1).all()
    assert not gradients[DEPTH:].any()
    column, step = int(gradients[0].abs().argmax()), 1e-6
    values = []
    for change in (step, -step):
        moved = adapters.clone()
        moved[0, column] += change
        values.append(float(model.features_of(inputs(2), moved, ALL)[:, 0].sum().detach()))
        model._context.running = None
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(gradients[0, column]), rel=1e-5)


def test_a_pass_is_over_when_nothing_can_follow(
    model: SweepModel, adapters: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        model.features_of(inputs(2), adapters, ALL)
    assert not running(model)
    features = model.features_of(inputs(2), adapters, ALL, torch.zeros_like(adapters))
    assert running(model)
    with pytest.raises(RuntimeError, match="scalar"):
        model.backward(features)
    assert not running(model)
    monkeypatch.setattr(model, "_model", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.features_of(inputs(2), adapters, ALL)
    assert not running(model)


@pytest.mark.parametrize("agrees", [True, False])
def test_blocks_are_fused_where_they_give_the_same(
    agrees: bool, foundation: Foundation, model: SweepModel, adapters: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = sweep_model.nearly_same_change
    monkeypatch.setattr(sweep_model, "nearly_same_change", lambda *states: agrees and compare(*states))
    fused = SweepModel(foundation, inputs)
    assert fused.fused == (DEPTH if agrees else 0)
    blocks = fused._model.get_submodule(foundation.block_path)
    assert all(isinstance(block, WholeBlock) == agrees for block in blocks)
    assert not any(block._forward_hooks for block in blocks)
    torch.testing.assert_close(fused.features_of(inputs(4), adapters, ALL), model.features_of(inputs(4), adapters, ALL))


def test_nothing_is_fused_unasked(model: SweepModel) -> None:
    assert model.fused == 0


def test_a_fused_block_that_takes_no_such_arguments_does_not_agree(foundation: Foundation) -> None:
    class Candidate:
        arguments = BatchArguments((0,), hidden=0, returned=0)

        def __init__(self, compute: Callable[[Tensor], Any], *, takes: bool = True) -> None:
            self.compute, self.takes = compute, lambda args, kwargs: takes

        def __call__(self, x: Tensor) -> Any:
            return self.compute(x)

    def refuse(x: Tensor) -> None:
        raise TypeError

    large, change = torch.full((2,), 1e3, dtype=torch.float64), torch.tensor([1e-3, 0.0], dtype=torch.float64)
    candidates = [
        Candidate(refuse),
        Candidate(lambda x: (x + change,), takes=False),
        Candidate(lambda x: (x + change,)),
        # Beside large hidden states, a change that is missing would be a small difference.
        Candidate(lambda x: (x,)),
    ]
    agrees: dict[int, bool] = {}
    for position, candidate in enumerate(candidates):
        hook = sweep_model._compare(candidate, agrees, position)  # type: ignore[arg-type]
        hook(None, (large,), {}, (large + change, None))
    assert agrees == {0: False, 1: False, 2: True, 3: False}


class Shards:
    """In the place of `Sharding`, of a model that is whole."""

    def __init__(self) -> None:
        self.attached: list[nn.Module] = []
        self.released = 0

    def attach(self, model: nn.Module) -> None:
        self.attached.append(model)

    def release(self) -> None:
        self.released += 1


def test_a_sharded_model_runs_every_block_in_every_pass(
    foundation: Foundation, model: SweepModel, adapters: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards()
    sharded = SweepModel(foundation, inputs, fuse_blocks=False, sharding=shards)  # type: ignore[arg-type]
    assert shards.attached == [foundation.model, sharded._model]
    slots = ALL.copy()
    slots[0, 1] = -1
    gradients, expected = torch.zeros_like(adapters), torch.zeros_like(adapters)
    for each, sink in ((sharded, gradients), (model, expected)):
        each.backward(each.features_of(inputs(2), adapters, slots, sink).sum())
    torch.testing.assert_close(gradients, expected)
    assert shards.released == 1
    ran: list[int] = []
    for position, block in enumerate(sharded._model.get_submodule(foundation.block_path)):
        block.block.register_forward_hook(lambda *_, position=position: ran.append(position))
    sharded.dummy_pass(inputs(1))
    assert ran == list(range(DEPTH))
    assert shards.released == 2
    assert not running(sharded)

"""Blocks that backward runs again give the same, and keep less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedra_engine.execution.memory import saved_bytes
from fedra_engine.execution.sweep_block import BankFactors
from fedra_engine.execution.sweep_model import SweepModel
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting


def both(setting: Setting) -> tuple[Setting, Setting]:
    return setting, replace(setting, checkpoint_blocks=True)


def assert_same_updates(setting: Setting) -> None:
    plain, checkpointed = (each.rounds(lanes=3, count=2) for each in both(setting))
    for one, other in zip(plain, checkpointed, strict=True):
        assert one.updates.keys() == other.updates.keys()
        for client, update in one.updates.items():
            for name, tensor in update.items():
                change = (tensor - one.before[name]).abs().max()
                # A gradient added twice, or not at all, would change it by as much as itself.
                assert (other.updates[client][name] - tensor).abs().max() <= 1e-10 * change, (client, name)


@pytest.mark.parametrize("fuse_blocks", [False, True])
@pytest.mark.parametrize("family", ["vit", "dinov2", "llama", "gpt2_lm"])
def test_updates_are_the_same_with_dropout(family: str, fuse_blocks: bool) -> None:
    assert_same_updates(make_setting(family, ADAMW, dropout=0.3, fuse_blocks=fuse_blocks))


def test_updates_are_the_same_where_whole_blocks_are_shared_by_all() -> None:
    setting = make_setting("bert", SGD)
    setting.clients = replace(setting.clients, capacities=setting.clients.capacities * 0 + 4)
    assert_same_updates(setting)


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_a_pass_keeps_less_than_half(monkeypatch: pytest.MonkeyPatch, fuse_blocks: bool) -> None:
    setting = make_setting("llama", SGD, fuse_blocks=fuse_blocks)
    features = SweepModel.features
    kept: dict[bool, list[int]] = {False: [], True: []}

    def observed(self: SweepModel, *args: object) -> Tensor:
        _, _, adapters, *_ = args
        assert isinstance(adapters, BankFactors)
        besides = [*setting.foundation.model.parameters(), *adapters.lora_a, *adapters.lora_b]
        kept[each.checkpoint_blocks].append(saved_bytes(lambda: features(self, *args), besides))
        return features(self, *args)

    for each in both(setting):
        executor = each.executor(lanes=6)
        monkeypatch.setattr(SweepModel, "features", observed)
        for _ in executor.train(*each.work(0, torch.arange(6).numpy()), each.state()):
            pass
        monkeypatch.undo()
    assert len(kept[False]) == len(kept[True]) > 1
    assert sum(kept[True]) < 0.5 * sum(kept[False])

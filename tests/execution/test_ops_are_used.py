"""The sweep's work is done by the kernel ops: where one fails, the round fails."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from fedra_engine.execution import banks, fused_block, sweep_block, whole_block
from fedra_engine.federation import aggregation
from fedra_engine.models import task
from tests.tiny_federation import ADAMW, SGD, make_setting

PLAIN = [
    (sweep_block, "lora_linear"),
    (task, "head_cross_entropy"),
    (banks, "squared_norms"),
    (banks, "sgd"),
    (aggregation, "aggregate"),
    (aggregation, "finish_aggregate"),
]


class Reached(Exception):
    pass


def fail(*_: Any, **__: Any) -> None:
    raise Reached


@pytest.mark.parametrize(("module", "op"), PLAIN, ids=[op for _, op in PLAIN])
def test_a_round_needs_the_op(monkeypatch: pytest.MonkeyPatch, module: ModuleType, op: str) -> None:
    monkeypatch.setattr(module, op, fail)
    with pytest.raises(Reached):
        make_setting("vit", SGD).rounds(3, 1)


def test_a_round_with_adamw_needs_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banks, "adamw", fail)
    with pytest.raises(Reached):
        make_setting("vit", ADAMW).rounds(3, 1)


def test_a_round_with_fused_blocks_needs_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_block, "stream_block", fail)
    with pytest.raises(Reached):
        make_setting("llama", SGD, fuse_blocks=True).rounds(3, 1)


def test_a_round_with_whole_blocks_needs_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_block, "pre_norm_block", fail)
    with pytest.raises(Reached):
        make_setting("vit", SGD, fuse_blocks=True).rounds(3, 1)

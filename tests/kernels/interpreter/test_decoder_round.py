"""A round of a language model through the Triton kernels gives what plain blocks give in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.plan import StepTables
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.models.structure import ALL_LINEAR
from fedra_kernels import dispatch
from tests.tiny_federation import SGD, Round, make_setting

from ..helpers import relative_error

# A round in the interpreter takes many seconds.
ONE_STEP = replace(SGD, max_local_steps=1)


@pytest.mark.parametrize(("family", "dropout"), [("llama_lm", 0.0), ("qwen3_lm", 0.3)])
def test_a_round_equals_plain_blocks_in_float64(family: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Tensor] = []
    optimize = SweepExecutor._optimize

    def recording(executor: SweepExecutor, pool: LanePool, tables: StepTables) -> None:
        gradients.append(pool.adapters.gradients[tables.slots].double())
        optimize(executor, pool, tables)

    def train(dtype: torch.dtype, fuse_blocks: bool) -> tuple[Round, list[Tensor]]:
        gradients.clear()
        (round,) = make_setting(
            family, ONE_STEP, dtype=dtype, fuse_blocks=fuse_blocks, dropout=dropout, target_modules=ALL_LINEAR
        ).rounds(4)
        return round, list(gradients)

    monkeypatch.setattr(SweepExecutor, "_optimize", recording)
    found, by_kernels = train(torch.float32, fuse_blocks=True)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    expected, plain = train(torch.float64, fuse_blocks=False)
    assert len(plain) > 1
    for step, (gradient, wanted) in enumerate(zip(by_kernels, plain, strict=True)):
        assert relative_error(gradient, wanted) <= 1e-5, f"step {step}"
    for client, tensors in expected.updates.items():
        for name, tensor in tensors.items():
            assert relative_error(found.updates[client][name].double(), tensor) <= 1e-5, (client, name)

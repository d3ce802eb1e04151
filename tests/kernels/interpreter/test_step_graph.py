"""Steps through the Triton kernels, recorded and replayed: what they read changes only where a GPU would read it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedra_engine.execution.step_graph import GraphCapture
from fedra_engine.execution.sweep import SweepExecutor
from tests.execution.recorded_graph import RecordedCapture
from tests.execution.test_step_graph import ONE_SAMPLE, poison
from tests.tiny_federation import ADAMW, make_setting


def test_replayed_launches_give_the_same_bits() -> None:
    training = replace(ADAMW, **ONE_SAMPLE)
    setting = make_setting("vit", training, dropout=0.3, dtype=torch.float32, fuse_blocks=True)

    def trained(capture: GraphCapture | None) -> list[Tensor]:
        executor = setting.executor(2)
        assert isinstance(executor, SweepExecutor)
        executor.capture = capture and (lambda: capture)
        found = []
        # Of 6 and 14 steps.
        for updates in executor.train(*setting.work(0, np.array([1, 4])), setting.state()):
            found += [updates.losses.clone(), updates.adapters[updates.slots], updates.heads[updates.head_rows]]
        return found

    capture = RecordedCapture(poison)
    for found, expected in zip(trained(capture), trained(None), strict=True):
        assert torch.equal(found, expected)
    assert capture.replays == [5, 7]

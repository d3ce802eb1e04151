"""A whole training round through the Triton kernels gives what it gives through the torch path."""

from __future__ import annotations

import pytest
import torch

from fedra_engine.config import TrainingConfig
from fedra_kernels import dispatch
from tests.tiny_federation import ADAMW, SGD, Setting, make_setting


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# Each optimizer once and each kind of block once: a round in the interpreter takes many seconds.
@pytest.mark.parametrize(("training", "fuse_blocks"), [(SGD, True), (ADAMW, False)], ids=["fused", "plain"])
def test_a_round_through_triton_equals_the_torch_path(
    monkeypatch: pytest.MonkeyPatch, training: TrainingConfig, fuse_blocks: bool
) -> None:
    def setting() -> Setting:
        return make_setting("vit", training, dropout=0.3, dtype=torch.float32, fuse_blocks=fuse_blocks)

    (found,) = setting().rounds(4)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    (expected,) = setting().rounds(4)
    # AdamW divides by the root of tiny second moments, which magnifies rounding.
    tolerance = 1e-5 if training is SGD else 1e-3
    for name, tensor in expected.after.items():
        assert relative_error(found.after[name], tensor) <= tolerance, name
    for client, tensors in expected.updates.items():
        for name, tensor in tensors.items():
            assert relative_error(found.updates[client][name], tensor) <= tolerance, name

"""With a model in low precision the sweep gives what the sub-models give, within the rounding of that precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny_federation import SGD, Tensors, make_setting

# Unit roundoffs are 2^-8 and 2^-11; a gradient goes through a few dozen rounded products.
TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.003}


def change(after: Tensors, before: Tensors) -> torch.Tensor:
    """All changes, one after another; adapters and heads are kept in float32."""
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    return torch.cat([(tensor - before[name]).flatten() for name, tensor in after.items()])


@pytest.mark.parametrize("fuse_blocks", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("family", ["vit", "dinov2", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_agree_within_the_rounding(dtype: torch.dtype, family: str, fuse_blocks: bool) -> None:
    one_step = replace(SGD, momentum=0.0, weight_decay=0.0, clip_norm=None, max_local_steps=1)
    setting = make_setting(family, one_step, dtype=dtype, fuse_blocks=fuse_blocks)
    (found,), (expected,) = setting.rounds(3), setting.rounds(None)
    for client, tensors in expected.updates.items():
        reference = change(tensors, expected.before)
        error = change(found.updates[client], expected.before) - reference
        assert error.norm() <= TOLERANCES[dtype] * reference.norm(), client


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_values_agree_after_a_round(family: str) -> None:
    setting = make_setting(family, SGD, dropout=0.3, dtype=torch.bfloat16)
    (found,), (expected,) = setting.rounds(3), setting.rounds(None)
    for client, tensors in expected.updates.items():
        for name, tensor in tensors.items():
            assert (found.updates[client][name] - tensor).abs().max() <= 3e-2 * tensor.abs().max(), name


@pytest.mark.parametrize("lanes", [3, None], ids=["sweep", "sequential"])
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_gradients_too_small_for_float16_are_kept(
    monkeypatch: pytest.MonkeyPatch, family: str, lanes: int | None
) -> None:
    """A classifier with tiny weights hands back gradients that float16 has no digits for."""
    # At so high a rate the change is the gradient, free of the rounding of the parameters.
    one_step = replace(SGD, lr=1e6, momentum=0.0, weight_decay=0.0, clip_norm=None, max_local_steps=1)

    def adapter_gradients(dtype: torch.dtype) -> torch.Tensor:
        setting = make_setting(family, one_step, dtype=dtype)
        state = setting.state()
        with monkeypatch.context() as patch:
            patch.setattr(type(setting), "state", lambda _: replace(state, heads=1e-4 * state.heads))
            (found,) = setting.rounds(lanes)
        adapters = {name: tensor for name, tensor in found.after.items() if "lora" in name}
        return change(adapters, found.before) / one_step.lr

    exact, found = adapter_gradients(torch.float32), adapter_gradients(torch.float16)
    assert 0 < exact.abs().max() < 1e-4
    assert (found - exact).norm() <= 0.01 * exact.norm()

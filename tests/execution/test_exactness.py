"""The sweep gives every client exactly the update its own sub-model would give it, trained alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedra_engine.config import TrainingConfig
from tests.tiny_federation import ADAMW, SGD, Setting, Tensors, make_setting


def assert_same_change(found: Tensors, expected: Tensors, before: Tensors, tolerance: float) -> None:
    """The largest error of every single tensor, over the largest entry of that tensor's change."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        change = (tensor - before[name]).abs().max()
        assert (found[name] - tensor).abs().max() <= tolerance * change, name


def assert_same_rounds(setting: Setting, lanes: int, count: int, tolerance: float) -> None:
    for found, expected in zip(setting.rounds(lanes, count), setting.rounds(None, count), strict=True):
        assert found.updates.keys() == expected.updates.keys() == set(range(len(setting.clients)))
        for client, tensors in expected.updates.items():
            assert_same_change(found.updates[client], tensors, expected.before, tolerance)
        assert_same_change(found.after, expected.after, expected.before, tolerance)


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert"])
@pytest.mark.parametrize(
    ("training", "dropout"), [(SGD, 0.0), (SGD, 0.3), (ADAMW, 0.3)], ids=["sgd", "sgd-dropout", "adamw-dropout"]
)
def test_sweep_equals_sequential_in_float64(family: str, training: TrainingConfig, dropout: float) -> None:
    assert_same_rounds(make_setting(family, training, dropout=dropout), lanes=3, count=3, tolerance=1e-8)


@pytest.mark.parametrize("fuse_blocks", [False, True])
def test_so_it_does_where_targets_differ_in_rank_and_scale(fuse_blocks: bool) -> None:
    """Also those that read the same input, of which some have one rank and one has another."""
    rules = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc2"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "o_proj": 1, "fc.": 5},
        "alpha_pattern": {"fc2": 2.0},
    }
    setting = make_setting("vit", ADAMW, dropout=0.3, fuse_blocks=fuse_blocks, **rules)
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)


@pytest.mark.parametrize("fuse_blocks", [False, True])
@pytest.mark.parametrize("layers", [[1, 2], [0]])
def test_blocks_without_adapters_stay_as_they_are(layers: list[int], fuse_blocks: bool) -> None:
    """Also of clients that hold no other blocks, who train their classifiers alone."""
    setting = make_setting("vit", SGD, dropout=0.3, fuse_blocks=fuse_blocks, layers_to_transform=layers)
    assert_same_rounds(setting, lanes=3, count=2, tolerance=1e-8)
    (found,) = setting.rounds(3)
    changed = {name.split(".")[1] for name in found.after if not torch.equal(found.after[name], found.before[name])}
    assert changed - {"weight", "bias"} == {str(layer) for layer in layers}


@pytest.mark.parametrize("lanes", [1, 2, 4, 6, 50])
def test_lane_count_does_not_change_updates(lanes: int) -> None:
    assert_same_rounds(make_setting("vit", SGD, dropout=0.3), lanes=lanes, count=1, tolerance=1e-8)


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert"])
def test_float32_values_agree_after_sgd(family: str) -> None:
    setting = make_setting(family, SGD, dropout=0.3, dtype=torch.float32)
    (found,), (expected,) = setting.rounds(3), setting.rounds(None)
    for client, tensors in expected.updates.items():
        for name, tensor in tensors.items():
            assert (found.updates[client][name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name


@pytest.mark.parametrize("family", ["vit", "dinov2", "bert"])
def test_float32_gradients_of_the_first_step_agree(family: str) -> None:
    # One step of plain SGD at so high a rate leaves the gradient alone, free of the rounding of the parameters.
    one_step = replace(SGD, lr=1e10, momentum=0.0, weight_decay=0.0, clip_norm=None, max_local_steps=1)
    setting = make_setting(family, one_step, dtype=torch.float32)
    (found,), (expected,) = setting.rounds(3), setting.rounds(None)
    for client, tensors in expected.updates.items():
        assert_same_change(found.updates[client], tensors, expected.before, tolerance=1e-5)


def test_a_client_alone_gets_the_update_it_gets_among_others() -> None:
    setting = make_setting("vit", ADAMW, dropout=0.3)
    (among,) = setting.rounds(6)
    executor = setting.executor(6)
    for client in range(len(setting.clients)):
        (alone,) = executor.train(*setting.work(0, np.array([client])), setting.state())
        assert_same_change(
            setting.named(alone.of_client(0), setting.state()), among.updates[client], among.before, tolerance=1e-8
        )


def test_reported_losses_and_counts_agree() -> None:
    setting = make_setting("vit", ADAMW, dropout=0.3)

    def reported(lanes: int | None) -> dict[int, tuple[int, int, float]]:
        work = setting.work(0, np.arange(len(setting.clients)))
        return {
            int(client): (int(samples), int(processed), float(loss))
            for update in setting.executor(lanes).train(*work, setting.state())
            for client, samples, processed, loss in zip(
                update.clients, update.samples, update.processed, update.losses, strict=True
            )
        }

    expected, found = reported(None), reported(4)
    assert found.keys() == expected.keys()
    for client, (samples, processed, loss) in expected.items():
        assert found[client][:2] == (samples, processed)
        assert found[client][2] == pytest.approx(loss, rel=1e-10)

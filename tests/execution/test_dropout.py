from __future__ import annotations

import itertools

import numpy as np
import torch

from fedra_engine.config import LoraConfig
from fedra_engine.execution.dropout import CounterDropout, DropoutKeys, PassDropout
from fedra_engine.execution.plan import plan_groups
from fedra_kernels import dropout_mask
from tests.tiny import make_tiny


def key(seed: int = 0, round: int = 0, client: int = 0, step: int = 0, block: int = 0, target: int = 0) -> int:
    keys = DropoutKeys(0.5, seed=seed, round=round, clients=[client], steps=[step])
    return int(keys.at(block, target)[0])


def test_keys_differ_in_every_part_they_are_made_of() -> None:
    parts = ["seed", "round", "client", "step", "block", "target"]
    settings = [dict(zip(parts, values, strict=True)) for values in itertools.product(range(3), repeat=6)]
    keys = [key(**setting) for setting in settings]
    assert len(set(keys)) == len(keys)
    assert min(keys) >= 0


def test_a_clients_keys_do_not_depend_on_the_others_in_the_pass() -> None:
    many = DropoutKeys(0.5, seed=1, round=2, clients=[7, 8, 9], steps=[0, 3, 1])
    alone = DropoutKeys(0.5, seed=1, round=2, clients=[8], steps=[3])
    assert many.at(4, 1)[1] == alone.at(4, 1)[0]


def test_every_target_of_every_block_gets_the_keys_of_its_holders() -> None:
    slots = np.array([[0, -1, -1], [1, -1, 2], [3, -1, 4]])
    plan = plan_groups(make_tiny("vit", LoraConfig(target_modules=["fc1"])), [2, 1, 4], slots)
    dropout = PassDropout(0.5, plan, 2)
    addresses = {site: drop.keys.data_ptr() for site, drop in dropout.of.items()}
    assert set(addresses) == {(block, target) for block in (0, 2) for target in range(2)}
    for steps in ([0, 3, 1], [1, 4, 2]):
        keys = DropoutKeys(0.5, seed=1, round=2, clients=[7, 8, 9], steps=steps)
        dropout.set_keys(keys)
        for target in range(2):
            assert dropout.of[0, target].keys.tolist() == keys.at(0, target).tolist()
            assert dropout.of[2, target].keys.tolist() == keys.at(2, target)[1:].tolist()
    # A captured step reads them where they were.
    assert {site: drop.keys.data_ptr() for site, drop in dropout.of.items()} == addresses


def test_masks_are_those_of_earlier_versions() -> None:
    assert (key(), key(1, 2, 3, 4, 5, 6)) == (1796369444147037970, 5403716272814296990)


def test_the_module_drops_by_its_key_and_keeps_the_mean() -> None:
    dropout = CounterDropout(block=2, target=1)
    dropout.keys = DropoutKeys(0.25, seed=0, round=0, clients=[5], steps=[1])
    x = torch.ones(8, 16, 64)
    dropped = dropout(x)
    expected = dropout_mask(key(client=5, step=1, block=2, target=1), 8 * 16, 64, 0.25)
    assert torch.equal(dropped.view(-1, 64), expected)
    # 8,192 draws: the mean of 0 and 4/3 has a standard deviation of 0.0064.
    assert abs(float(dropped.mean()) - 1) < 0.03

"""How far a block has moved is the norm of what its weights have become beside the frozen ones."""

from __future__ import annotations

import torch

from fedra_engine.models.adapters import AdapterLayout, Target, initial_adapters
from fedra_engine.models.state import GlobalState, block_changes

SCALE = 2.0
LAYOUT = AdapterLayout((Target("q", 5, 4, 2, SCALE), Target("fc", 3, 7, 1, SCALE)))


def start(base: tuple[torch.Tensor, ...] = ()) -> GlobalState:
    return GlobalState(initial_adapters(LAYOUT, 3, seed=0, dtype=torch.float64), torch.zeros(1, 4), base)


def tuned(initial: GlobalState, base: tuple[torch.Tensor, ...] = ()) -> GlobalState:
    adapters = initial.adapters + torch.randn(3, LAYOUT.size, dtype=torch.float64)
    # Nobody held the first block.
    adapters[0] = initial.adapters[0]
    return GlobalState(adapters, initial.heads, base)


def products(state: GlobalState, target: int) -> torch.Tensor:
    return SCALE * LAYOUT.lora_b(state.adapters, target) @ LAYOUT.lora_a(state.adapters, target)


def test_it_is_the_norm_of_the_products_of_all_targets() -> None:
    initial = start()
    state = tuned(initial)
    expected = torch.cat([products(state, target).flatten(1) for target in range(2)], dim=1).norm(dim=1)
    found = block_changes(state, initial, LAYOUT)
    torch.testing.assert_close(found, expected)
    assert found[0] == 0 < found[1]


def test_what_a_method_has_written_into_the_frozen_weights_counts() -> None:
    shapes = ((3, 4, 5), (3, 7, 3))
    initial = start(tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    state = tuned(initial, tuple(weights + 0.5 for weights in initial.base))
    expected = torch.cat([(products(state, target) + 0.5).flatten(1) for target in range(2)], dim=1).norm(dim=1)
    torch.testing.assert_close(block_changes(state, initial, LAYOUT), expected)

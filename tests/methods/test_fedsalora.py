"""FedSA-LoRA averages A and leaves B with its client."""

from __future__ import annotations

import numpy as np
import torch

from tests.methods.expected import columns, mean_adapters
from tests.methods.rounds import (
    DEPTH,
    EVERYBODY,
    LAYOUT,
    Update,
    initial_state,
    method,
    packed,
    random_updates,
    run_round,
)


def test_fedsalora_averages_a_and_gives_everybody_its_own_b_back() -> None:
    made = method("fedsalora")
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    expected = mean_adapters(state, updates, "uniform")
    np.testing.assert_allclose(after.adapters[:, columns("A")], expected[:, columns("A")], atol=1e-12)
    assert torch.equal(after.adapters[:, columns("B")], state.adapters[:, columns("B")])

    restored = method("fedsalora")
    restored.restore(made.tensors())
    for again in (made, restored):
        hand_out = again.assign(EVERYBODY, 1).hand_out
        for update in updates:
            slots = after.adapters.clone()
            hand_out(update.client, np.arange(DEPTH), slots)
            for block in range(DEPTH):
                own = update.adapters.get(block, after.adapters[block])
                assert torch.equal(slots[block, columns("B")], own[columns("B")])
                assert torch.equal(slots[block, columns("A")], after.adapters[block, columns("A")])


def test_fedsalora_evaluates_the_clients_of_each_domain() -> None:
    made = method("fedsalora")
    state, updates = initial_state(made), random_updates(made)
    after = run_round(made, state, updates)
    states = [list(of_domain) for of_domain in made.personal_states(after).values()]
    assert [len(of_domain) for of_domain in states] == [2, 2, 2]
    own = states[1][1].adapters
    for block, adapters in updates[3].adapters.items():
        assert torch.equal(own[block, columns("B")], adapters[columns("B")])


def test_a_client_that_trained_no_adapters_keeps_nothing() -> None:
    made = method("fedsalora")
    slots = {2: torch.ones(LAYOUT.size, dtype=torch.float64)}
    made.receive(packed([Update(0, 1, slots, {0: torch.zeros(1)}), Update(1, 1, {}, {0: torch.zeros(1)})]))
    assert set(made.tensors()) == {"blocks.0", "factors.0"}


def test_replaced_factors_take_no_memory() -> None:
    made = method("fedsalora")
    for blocks in ((0, 1, 2, 3), (1, 2, 3, 4), (0, 2, 4, 5)):
        slots = {block: torch.full((LAYOUT.size,), float(block)) for block in blocks}
        made.receive(packed([Update(0, 1, slots, {0: torch.zeros(1)})]))
    kept = list(made._kept[0].values())
    storages = {factors.untyped_storage().data_ptr(): factors.untyped_storage().nbytes() for factors in kept}
    assert sum(storages.values()) == sum(factors.nbytes for factors in kept)
    tensors = made.tensors()
    assert torch.equal(tensors["factors.0"][:, 0].long(), tensors["blocks.0"])

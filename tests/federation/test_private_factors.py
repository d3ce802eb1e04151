"""What clients keep to themselves."""

from __future__ import annotations

import torch

from fedra_engine.federation.private_factors import PrivateFactors
from tests.methods.rounds import DEPTH, LAYOUT, Update, packed

B = LAYOUT.columns("B")


def test_replaced_factors_take_no_memory() -> None:
    private = PrivateFactors(B, DEPTH)
    for blocks in ((0, 1, 2, 3), (1, 2, 3, 4), (0, 2, 4, 5)):
        slots = {block: torch.full((LAYOUT.size,), float(block)) for block in blocks}
        private.keep(packed([Update(0, 1, slots, {0: torch.zeros(1)})]))
    kept = list(private._kept[0].values())
    storages = {factors.untyped_storage().data_ptr(): factors.untyped_storage().nbytes() for factors in kept}
    assert sum(storages.values()) == sum(factors.nbytes for factors in kept)
    tensors = private.tensors()
    assert torch.equal(tensors["factors.0"][:, 0].long(), tensors["blocks.0"])

"""Whether a model reads the first token of a sample alone after its last block, as a ViT with a class token does.

A sample's last block then needs its other tokens as keys and values only, which saves three quarters of its products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedra_engine.models.foundation import Foundation
from fedra_engine.models.structure import is_linear, linear_shape

if TYPE_CHECKING:
    from fedra_engine.execution.sweep_block import SweepBlock
    from fedra_engine.execution.sweep_model import SweepModel

_WORTHWHILE = 50e6
"""FLOP of products that a block must save in forward to make up for its two parts. On one thread of an EPYC (Zen 4) the
embedded model, whose blocks save a tenth of this, was as fast with two parts as without (paired runs, by hand)."""


def find_fewest_first_token_samples(
    foundation: Foundation, model: SweepModel, inputs: Mapping[str, Tensor]
) -> int | None:
    """`SweepModel.fewest_first_token_samples`, seen on a pass in which samples go through the first block alone.

    Args:
        inputs: those of a few samples.
    """
    slots = np.full((1, foundation.depth), -1)
    slots[0, 0] = 0
    bank = torch.zeros(1, foundation.adapter_layout.size, dtype=foundation.adapter_dtype, device=foundation.device)
    tokens: list[int] = []

    def spoil(block: SweepBlock, args: Any, output: Any) -> Any:
        states = block.arguments.returned_states(output).clone()
        tokens.append(states.shape[1])
        states[:, 1:] = torch.nan
        return block.arguments.output(states)

    with torch.no_grad():
        expected = model.features_of(inputs, bank, slots)
        first: Any = model.blocks[0]
        hook = first.register_forward_hook(spoil)
        try:
            found = model.features_of(inputs, bank, slots)
        finally:
            hook.remove()
    if tokens[0] == 1 or not torch.equal(found, expected):
        return None
    shapes = [linear_shape(module) for module in foundation.blocks[0].modules() if is_linear(module)]
    # Queries, keys and values are computed for all tokens: of most blocks a quarter.
    saved = 2 * (tokens[0] - 1) * sum(inputs * outputs for inputs, outputs in shapes) * 3 / 4
    return math.ceil(_WORTHWHILE / saved)

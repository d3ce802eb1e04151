"""FedRA (Su, Li, Xue; ECCV 2024; arXiv 2311.11227): a random allocation matrix every round.

Client i draws a set S_i of capacity_i distinct blocks, uniformly. It trains the sub-model of these blocks in
ascending order. Block l's adapter becomes the mean over {i : l ∈ S_i}; a block that nobody drew keeps its own.
"""

from __future__ import annotations

from fedra_engine.methods.allocated import AllocatedMethod
from fedra_engine.methods.base import register_method


@register_method("fedra")
class FedRA(AllocatedMethod):
    """Random allocation and the mean over each block's holders: the default of every method here."""

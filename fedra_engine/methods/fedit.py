"""FedIT (Zhang et al., ICASSP 2024; arXiv 2305.05644): FedAvg on both LoRA factors.

A ← Σ_i p_i A_i and B ← Σ_i p_i B_i, with p_i in proportion to client i's samples (`method.weighting samples`), over
the clients that trained the block. The mean of the factors is not the factor of the mean product.
"""

from __future__ import annotations

from fedra_engine.methods.allocated import AllocatedMethod


class FedIT(AllocatedMethod):
    """Averages A and B separately."""

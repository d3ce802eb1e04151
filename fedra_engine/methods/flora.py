"""FLoRA (Wang et al., NeurIPS 2024; arXiv 2409.05976): stacking instead of averaging.

The server stacks the clients' factors: [B_1 … B_n] diag(p_1, …, p_n) [A_1; …; A_n] = Σ_i p_i B_i A_i, the exact mean
product whatever the ranks, adds scale times it to the frozen weights, and every round starts with fresh adapters: A
random, B zero. The server's sum is that of the stack; clients would download the stack and add it themselves.
"""

from __future__ import annotations

from dataclasses import replace

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.methods.base import register_method
from fedra_engine.methods.products import BaseWritingMethod, ProductAggregator
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.state import GlobalState


@register_method("flora")
class FLoRA(BaseWritingMethod):
    """Merges the mean product into the model; adapters start afresh every round."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        federation = self.federation
        fresh = initial_adapters(
            federation.layout, federation.depth, seed=federation.seed, round=round + 1, dtype=previous.adapters.dtype
        )
        return replace(
            aggregator.result(),
            adapters=fresh.to(previous.adapters.device),
            base=self.add_to_base(aggregator, aggregator.mean_products()),
        )

"""FedEx-LoRA (Singhal et al., ACL 2025; arXiv 2410.09432): the mean of the factors, made exact by a residual.

A and B are averaged as in FedIT. What this misses, ΔW_res = Σ p_i B_i A_i − (Σ p_i B_i)(Σ p_i A_i), is added to the
frozen weights (times the adapters' scale), so that the new model is the exact mean of the clients' models.
"""

from __future__ import annotations

from dataclasses import replace

from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.methods.base import register_method
from fedra_engine.methods.products import BaseWritingMethod, ProductAggregator, factor_products
from fedra_engine.models.state import GlobalState


@register_method("fedexlora")
class FedExLora(BaseWritingMethod):
    """Averages A and B and writes what the product of the means misses into the model."""

    def aggregate(self, aggregator: Aggregator, previous: GlobalState, round: int) -> GlobalState:
        assert isinstance(aggregator, ProductAggregator)
        mean = aggregator.result()
        of_means = factor_products(mean.adapters, self.federation.layout)
        residuals = [product - other for product, other in zip(aggregator.mean_products(), of_means, strict=True)]
        return replace(mean, base=self.add_to_base(aggregator, residuals))

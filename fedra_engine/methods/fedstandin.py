"""FedStandIn (ours): FedRA in which a linear map stands in for every block that a client lacks.

Allocation and aggregation are FedRA's. What changes is the sub-model: where FedRA's client skips a block l that it does
not hold, here h ← h + (h − μ_l) D_l U_l + b_l. The server fits these maps of low rank to the frozen blocks by ridge
regression, in closed form, from unlabelled samples; nobody trains or uploads them. docs/methods.md describes the
method, docs/results/evidence.md what it was compared with.
"""

from __future__ import annotations

from fedra_engine.methods.base import register_method
from fedra_engine.methods.fedra import FedRA


@register_method("fedstandin")
class FedStandIn(FedRA):
    """FedRA with `method.stand_in linear`."""

    stand_in = "linear"

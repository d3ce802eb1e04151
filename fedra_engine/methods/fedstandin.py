"""FedStandIn (ours): FedRA in which a linear map stands in for every block that a client lacks.

Allocation and aggregation are FedRA's. A client that lacks block l applies h ← h + (h − μ_l) D_l U_l + b_l in its
place. The server fits these low-rank maps to the frozen blocks by ridge regression, in closed form, on unlabelled
samples; they are never trained or uploaded. docs/stand_ins.md defines μ, D, U and b; docs/results/evidence.md has
results.
"""

from __future__ import annotations

from fedra_engine.methods.base import register_method
from fedra_engine.methods.fedra import FedRA


@register_method("fedstandin")
class FedStandIn(FedRA):
    """FedRA with stand-ins: for this name `MethodConfig.has_stand_ins` is true."""

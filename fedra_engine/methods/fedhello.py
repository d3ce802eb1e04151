"""Fed-HeLLo (Zhang et al., 2025; arXiv 2506.12213): every client runs the whole model and trains some of its blocks.

A client trains the adapters of `capacity` blocks (at most all that have adapters), chosen by
`method.fedhello.selection`:
- `first`, `last`, `bottleneck`, `spread`: a fixed pattern (geometrically defined allocation);
- `random`: drawn every round with equal chances;
- `fisher` (FIM-HLA): drawn every round with chances in the ratio 1 : 2 : 3 for blocks of low, middle and high Fisher
  information. The three are k-means clusters of the blocks' scores. A block's score is the sum over its factors of
  ‖mean_s g_s²‖_F, g_s being the gradient of sample s's true-class logit (authors' code, github.com/TNI-playground/
  Fed_HeLLo; its cluster labels are in arbitrary order, here they follow the scores). Every `fisher_every` rounds it is
  measured on `fisher_samples` training samples and the new global state; until then, chances are equal.
Each block's adapters are averaged over the clients that trained them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import FedHelloConfig
from fedra_engine.federation.allocation import weighted_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.methods.base import Federation, OwnAllocation, check_classifier, register_method
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator


@register_method("fedhello")
class FedHello(OwnAllocation):
    """Participants hold all blocks and train `capacity` of them."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self._options: FedHelloConfig = self.options
        if self._options.selection == "fisher":
            check_classifier(federation, "fedhello (selection fisher)")
        count = int(federation.adapted.sum())
        self._chances = np.full(count, 1 / count)
        """float64 [adapted blocks]."""

    def assign(self, participants: NDArray[np.int64], round: int) -> Assignment:
        adapted, capacities = self.federation.adapted, self.federation.capacities(round)
        if self._options.selection in ("random", "fisher"):
            # Drawn for all clients, so that a client's blocks do not depend on the other participants.
            rng = generator(self.federation.seed, round=round, purpose="allocation")
            chosen = weighted_allocation(capacities, self._chances, rng)[participants]
        else:
            most = len(self._chances)
            patterns = np.stack([pattern(self._options.selection, count, most) for count in range(most + 1)])
            chosen = patterns[np.minimum(capacities[participants], most)]
        trained = np.zeros((len(participants), len(adapted)), dtype=np.bool_)
        trained[:, adapted] = chosen
        return Assignment(held=np.ones_like(trained), trained=trained)

    def after_round(self, state: GlobalState, round: int) -> None:
        options = self._options
        if options.selection != "fisher" or (round + 1) % options.fisher_every != 0:
            return
        scores = self.federation.fisher(state, options.fisher_samples, round)
        if not np.isfinite(scores).all():
            raise InputError(
                f"method.fedhello.selection: found no sample with a finite gradient to take Fisher information from in "
                f"round {round + 1}, expected training to stay finite (lower training.lr, or model.dtype float32)"
            )
        self._chances = chances(scores[self.federation.adapted])

    def tensors(self) -> dict[str, Tensor]:
        return {"chances": torch.from_numpy(self._chances)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._chances = tensors["chances"].numpy().copy()


def pattern(selection: str, count: int, depth: int) -> NDArray[np.bool_]:
    """The `count` blocks of a fixed `selection`, bool [depth]."""
    blocks = {
        "first": np.arange(count),
        "last": np.arange(depth - count, depth),
        "bottleneck": np.r_[np.arange(-(-count // 2)), np.arange(depth - count // 2, depth)],
        "spread": np.linspace(0, depth - 1, count).round().astype(np.int64),
    }[selection]
    return np.isin(np.arange(depth), blocks)


def chances(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance of each block, in the ratio 1 : 2 : 3 for clusters of low, middle and high `scores` [blocks]."""
    # scikit-learn takes a second and more to import.
    from sklearn.cluster import KMeans

    clusters = min(3, len(np.unique(scores)))
    means = KMeans(clusters, n_init=10, random_state=0).fit(scores[:, None])
    order = np.argsort(np.argsort(means.cluster_centers_[:, 0]))
    weights = (order[means.labels_] + 1).astype(np.float64)
    return weights / weights.sum()

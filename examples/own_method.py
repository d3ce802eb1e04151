"""A method of one's own: FedRA whose clients also keep their adapters sparse, by an L1 penalty on A and B."""

import sys
from dataclasses import dataclass, replace

import torch

from fedra_engine import ExperimentConfig, LocalTerm, option, register_method, simulate
from fedra_engine.config.options import NON_NEGATIVE
from fedra_engine.methods.fedra import FedRA


@dataclass
class SparseConfig:
    """Its options: `method.sparse.weight` in configurations, `--method.sparse.weight` on the command line."""

    weight: float = option(0.003, NON_NEGATIVE)


@dataclass(frozen=True)
class L1(LocalTerm):
    weight: float

    def add_gradients(self, clients):  # of all clients at once
        clients.adapters.gradients.add_(clients.adapters.parameters.sign(), alpha=self.weight)

    def loss(self, client):  # of one client, for the sequential executor
        return self.weight * torch.stack([factor.abs().sum() for pair in client.factors for factor in pair]).sum()


@register_method("sparse", SparseConfig)
class Sparse(FedRA):
    def assign(self, participants, round):
        return replace(super().assign(participants, round), terms=(L1(self.options.weight),))


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs"
    result = simulate(ExperimentConfig(rounds=4, output_dir=folder), method="sparse")
    print("mean size of an adapter's entries:", float(result.state.adapters.abs().mean()))

"""pfl-research: its simulated backend, federated averaging and local training."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.stats import MappedVectorStatistics

from benchmarks.peers.job import Job, Loop
from benchmarks.peers.local_training import CachedModel
from benchmarks.peers.work import State, Work

_HOLDERS = "holders"


class _Model(CachedModel):
    """The model with what pfl needs."""

    def metrics(self, rows: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """None: nothing is evaluated."""
        return {}


class _Algorithm(FederatedAveraging):
    """Federated averaging in which a client may lack blocks; each block is averaged over its holders."""

    def __init__(self, work: Work, *, idle: bool) -> None:
        super().__init__()
        # In iteration 0 pfl also evaluates every client, before and after its training.
        self._current_central_iteration = 1
        self._work, self._idle = work, idle
        self._depth = len({name.split(".")[1] for name in work.state if name.startswith("blocks.")})
        self._partial = any(len(blocks) < self._depth for blocks in work.held)

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        """Train on the client's blocks."""
        held = self._work.held[int(user_dataset.user_id)]
        model.pytorch_model.use(held)
        if self._idle:
            statistics, metrics = model.get_model_difference(initial_model_state), Metrics()
        else:
            statistics, metrics = super().train_one_user(initial_model_state, model, user_dataset, central_context)
        if self._partial:
            statistics[_HOLDERS] = torch.zeros(self._depth).index_fill_(0, torch.tensor(held), 1.0)
        return statistics, metrics

    def process_aggregated_statistics(
        self, central_context: Any, aggregate_metrics: Any, model: Any, statistics: Any
    ) -> Any:
        """Average every block over its holders, the others over all."""
        if not self._partial:
            return super().process_aggregated_statistics(central_context, aggregate_metrics, model, statistics)
        holders, _ = statistics.pop(_HOLDERS)
        names = {id(parameter): name for name, parameter in model.pytorch_model.trained.items()}
        mean = {}
        for variable, total in statistics.items():
            name = names[id(model.variable_map[variable])]
            of_block = name.startswith("blocks.")
            mean[variable] = total / (holders[int(name.split(".")[1])].clamp(min=1) if of_block else self._work.clients)
        return model.apply_model_update(MappedVectorStatistics(mean))


def serve(job: Job, loop: Loop) -> None:
    """Run rounds."""
    logging.getLogger("pfl").setLevel(logging.ERROR)
    work = job.work()
    module = _Model(work, job.attention, job.precision)
    trained = list(module.trained.values())

    def local_optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            trained, lr, betas=work.betas, eps=work.eps, weight_decay=work.weight_decay, fused=True
        )

    model = PyTorchModel(module, local_optimizer, torch.optim.SGD(trained, lr=1.0))
    data = {}
    for client, batches in enumerate(work.batches):
        rows = torch.cat(batches)
        data[client] = (rows, work.labels[rows])
    batch = max(len(rows) for rows in work.batches[0])
    users = FederatedDataset.from_slices(data, MinimizeReuseUserSampler(list(data)))
    backend = SimulatedBackend(training_data=users, val_data=users)
    schedule = NNAlgorithmParams(
        central_num_iterations=2, evaluation_frequency=2, train_cohort_size=work.clients, val_cohort_size=0
    )
    training = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=batch, local_max_grad_norm=work.clip_norm
    )

    def run_round() -> State:
        module.load(work.state)
        _Algorithm(work, idle=job.idle).run(schedule, backend, model, training, send_metrics_to_platform=False)
        return {name: parameter.detach().clone() for name, parameter in module.trained.items()}

    loop(run_round)

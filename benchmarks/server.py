"""What the engine costs beside the training itself: server time per client, and memory."""

from __future__ import annotations

import multiprocessing
import resource
import time

import numpy as np
import torch

from benchmarks.executors import run_round
from benchmarks.settings import CAPACITIES, Setting, tiny_vit
from fedra_engine.config import ClientsConfig, MethodConfig, TrainingConfig
from fedra_engine.execution.evaluation import FisherInformation
from fedra_engine.federation.clients import Clients, sample_participants
from fedra_engine.federation.work import LocalWork
from fedra_engine.methods.base import Federation
from fedra_engine.methods.registry import make_method
from fedra_engine.studies.measure import IdleExecutor


def server_milliseconds_per_client(setting: Setting, *, clients: int = 2000, samples: int = 28) -> float:
    """CPU time of a round without any training: sampling, allocation, batches, hand-out, aggregation."""
    capacities = np.resize(CAPACITIES, clients)
    federation = Clients([np.arange(samples)] * clients, np.arange(clients) % 6, capacities)
    foundation = setting.foundation
    fisher = FisherInformation(foundation, setting.sweep_model, setting.samples, seed=0)
    layout, adapted = foundation.adapter_layout, foundation.adapted
    method = make_method(Federation(MethodConfig(), federation, foundation.depth, layout, 0, fisher, adapted))
    training = TrainingConfig()
    started = time.process_time()
    participants = sample_participants(ClientsConfig(sampling="uniform"), federation, seed=0, round=0)
    assignment = method.assign(participants, 0)
    work = LocalWork(federation, participants, training, seed=0, round=0, lr=training.lr)
    executor = IdleExecutor(foundation, lanes=setting.lanes)
    aggregator = method.aggregator(setting.state, 0)
    for updates in executor.train(work, assignment, setting.state):
        aggregator.add(updates)
    method.aggregate(aggregator, setting.state, 0)
    return (time.process_time() - started) / clients * 1000


def sweep_peak_gigabytes() -> float:
    """The most memory resident in a fresh process that sweeps one round of the tiny ViT."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_sweep_tiny_vit)


def _sweep_tiny_vit() -> float:
    torch.set_num_threads(1)
    setting = tiny_vit()
    run_round(setting.sweep(), setting)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

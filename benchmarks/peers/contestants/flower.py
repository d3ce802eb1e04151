"""Flower: its simulation on Ray, one actor for each thread, in which the model is loaded and wrapped once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers.job import Job, Loop
from benchmarks.peers.local_training import CachedModel, train_client
from benchmarks.peers.work import State, Work, mean_over_holders


class _PartialFedAvg(FedAvg):
    """Federated averaging of every tensor over the clients that have it, for clients that lack blocks."""

    def __init__(self, state: State, **options: Any) -> None:
        super().__init__(**options)
        self._state = state

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what came back."""
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        updates = (_tensors(message) for message in valid)
        return ArrayRecord(mean_over_holders(self._state, updates)), None


def serve(job: Job, loop: Loop) -> None:
    """Run rounds."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    work = job.work()
    partial = any(len(client) < max(map(len, work.held)) for client in work.held)
    server, client_app = ServerApp(), ClientApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        given, model = _client_side(job)
        update = train_client(model, given, client, _tensors(message), idle=job.idle)
        samples = sum(len(rows) for rows in given.batches[client])
        content = RecordDict({"arrays": ArrayRecord(update), "metrics": MetricRecord({"num-examples": samples})})
        return Message(content=content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        options = {"fraction_evaluate": 0.0, "min_train_nodes": work.clients, "min_available_nodes": work.clients}

        def run_round() -> State:
            strategy = _PartialFedAvg(work.state, **options) if partial else FedAvg(**options)
            result = strategy.start(grid=grid, initial_arrays=ArrayRecord(work.state), num_rounds=1)
            return dict(result.arrays.to_torch_state_dict())

        loop(run_round)

    run_simulation(
        server,
        client_app,
        num_supernodes=work.clients,
        backend_config={
            "init_args": {"num_cpus": job.threads, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


@lru_cache(maxsize=1)
def _client_side(job: Job) -> tuple[Work, CachedModel]:
    """Work and model of an actor, which serves one job."""
    torch.set_num_threads(1)
    work = job.work()
    return work, CachedModel(work, job.attention, job.precision)


def _tensors(message: Message) -> State:
    return dict(message.content["arrays"].to_torch_state_dict())

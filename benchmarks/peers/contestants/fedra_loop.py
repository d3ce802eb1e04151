"""A loop of the structure of FedRA's published code: every client has a whole model of its own, from round to round.

In each round all weights, also the frozen ones, are copied to every client, which then makes a sub-model of them. The
optimizer is that of the other contestants; the published code has SGD.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from benchmarks.peers.job import Job, Loop
from benchmarks.peers.local_training import CachedModel, train_client
from benchmarks.peers.work import State, Work, mean_over_holders


def serve(job: Job, loop: Loop) -> None:
    """Run rounds."""
    work = job.work()
    server = CachedModel(work, job.attention, job.precision)
    clients = [copy.deepcopy(server, {id(server.inputs): server.inputs}) for _ in range(work.clients)]
    blocks = list(range(len(server.blocks)))

    def run_round() -> State:
        server.load(work.state)
        state = mean_over_holders(work.state, _updates(work, server, clients, blocks, idle=job.idle))
        server.load(state)
        return state

    loop(run_round)


def _updates(
    work: Work, server: CachedModel, clients: list[CachedModel], blocks: list[int], *, idle: bool
) -> Iterator[State]:
    for number, client in enumerate(clients):
        client.use(blocks)
        client.model.load_state_dict(copy.deepcopy(server.model.state_dict()))
        yield train_client(client, work, number, work.state, idle=idle)

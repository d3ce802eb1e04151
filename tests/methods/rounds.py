"""A round's updates without any training: random adapters and heads for whatever a method asks of its participants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.config import MethodConfig
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.methods.base import Federation, Method
from fedra_engine.methods.registry import make_method
from fedra_engine.models.adapters import AdapterLayout, Target
from fedra_engine.models.state import GlobalState

DEPTH = 6
ROUNDS = 10
RANK = 3
SCALE = 2.0
LAYOUT = AdapterLayout(
    tuple(Target(name, *shape, RANK, SCALE) for name, *shape in (("fc1", 5, 4), ("fc2", 4, 5), ("out", 5, 4)))
)
HEAD = 7
CAPACITIES = np.array([6, 5, 4, 3, 2, 2])
SAMPLES = [4, 9, 2, 7, 5, 3]
EVERYBODY = np.arange(6)


def federation(
    capacities: NDArray[np.int64] = CAPACITIES, ranks: NDArray[np.int64] | None = None, drawn: bool = False, **config
) -> Federation:
    clients = Clients([np.arange(count) for count in SAMPLES], np.arange(6) // 2, capacities, ranks)
    return Federation(
        *(MethodConfig(**config), clients, DEPTH, LAYOUT),
        seed=0,
        fisher=fisher_scores,
        adapted=np.ones(DEPTH, dtype=np.bool_),
        capacities_drawn=drawn,
        rounds=ROUNDS,
    )


def fisher_scores(state: GlobalState, samples: int, round: int) -> NDArray[np.float64]:
    """Scores in three clear groups: the middle blocks matter most."""
    return np.array([1.0, 5.0, 9.0, 9.1, 5.1, 1.1])


def method(name: str, **options) -> Method:
    return make_method(federation(name=name, **options))


@dataclass(frozen=True)
class Update:
    """What one client sent: adapters by block, classifiers by exit, its number of samples."""

    client: int
    samples: int
    adapters: dict[int, Tensor]
    heads: dict[int, Tensor]


def initial_state(made: Method, seed: int = 0) -> GlobalState:
    rng, layout = np.random.default_rng(seed), made.federation.layout
    adapters = torch.from_numpy(rng.normal(size=(DEPTH, layout.size)))
    base = tuple(torch.from_numpy(rng.normal(size=(DEPTH, t.out_features, t.in_features))) for t in layout.targets)
    return made.initial_state(GlobalState(adapters, torch.from_numpy(rng.normal(size=(1, HEAD)))), lambda: base)


def random_updates(made: Method, round: int = 0, participants: NDArray[np.int64] = EVERYBODY) -> list[Update]:
    """Random values for all that the participants train; what lies beyond a client's rank is zero."""
    assignment, layout = made.assign(participants, round), made.federation.layout
    updates = []
    for row, client in enumerate(participants.tolist()):
        rng = np.random.default_rng([round, client])
        adapters = {}
        for block in np.flatnonzero(assignment.trained_blocks[row]).tolist():
            adapters[block] = torch.from_numpy(rng.normal(size=layout.size))
            if assignment.ranks is not None:
                layout.truncate(adapters[block], int(assignment.ranks[row]))
        heads = {int(exit): torch.from_numpy(rng.normal(size=HEAD)) for exit in assignment.exits_of(row)}
        if adapters:
            updates.append(Update(client, SAMPLES[client], adapters, heads))
    return updates


def packed(updates: list[Update]) -> ClientUpdates:
    """The updates as executors yield them."""
    slots = [slot for update in updates for slot in update.adapters.values()]
    heads = [head for update in updates for head in update.heads.values()]
    counts = [len(update.adapters) for update in updates]
    head_counts = [len(update.heads) for update in updates]
    return ClientUpdates(
        clients=np.array([update.client for update in updates]),
        samples=np.array([update.samples for update in updates]),
        processed=np.array([update.samples for update in updates]),
        losses=torch.ones(len(updates), dtype=torch.float64),
        adapters=torch.stack(slots),
        slots=torch.arange(len(slots)),
        slot_owners=np.repeat(np.arange(len(updates)), counts),
        slot_blocks=np.array([block for update in updates for block in update.adapters]),
        heads=torch.stack(heads),
        head_rows=torch.arange(len(heads)),
        head_owners=np.repeat(np.arange(len(updates)), head_counts),
        head_exits=np.array([exit for update in updates for exit in update.heads]),
        norms=torch.ones(len(updates), dtype=torch.float64),
    )


def run_round(made: Method, state: GlobalState, updates: list[Update], round: int = 0) -> GlobalState:
    """The state after a round, its updates arriving in two portions."""
    aggregator = made.aggregator(state, round)
    half = len(updates) // 2
    for portion in (updates[half:], updates[:half]):
        if portion:
            batch = packed(portion)
            made.receive(batch)
            aggregator.add(batch)
    after = made.aggregate(aggregator, state, round)
    made.after_round(after, round)
    return after


def factors(slot: Tensor) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(A, B) of each target as NumPy arrays, cut from the slot by hand: all A first, then all B."""
    values, widths = slot.numpy(), [(t.in_features, t.out_features) for t in LAYOUT.targets]
    a, b, at = [], [], 0
    for inputs, _ in widths:
        a.append(values[at : at + RANK * inputs].reshape(RANK, inputs))
        at += RANK * inputs
    for _, outputs in widths:
        b.append(values[at : at + RANK * outputs].reshape(outputs, RANK))
        at += RANK * outputs
    return list(zip(a, b, strict=True))

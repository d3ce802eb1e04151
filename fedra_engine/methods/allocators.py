"""Allocators: who holds which block in a round, by the name that `method.allocation` gives.

Random ones draw for all clients, so that a client's blocks do not depend on the other participants; only `covered`
looks at these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedra_engine.config.options import registering
from fedra_engine.federation.allocation import (
    Allocation,
    ReferenceAllocation,
    prefix_allocation,
    repair_coverage,
    uniform_allocation,
    weighted_allocation,
)
from fedra_engine.methods.base import Federation
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import generator

Integers = NDArray[np.int64]
Rng = np.random.Generator
Allocator = Callable[[int, Integers, Integers, int, Rng, Federation], Allocation]
"""`allocator(round, capacities, participants, depth, rng, federation)` gives bool [participants, blocks].

`capacities` [clients] are those of all clients, `participants` ascending client indices, `depth` is the number of
blocks, `rng` is the generator of this round, and `federation` is what the server knows.
"""
Used = Literal["movement", "rounds"]

ALLOCATORS: dict[str, Allocator] = {}
"""The allocators by name."""
USES: dict[str, frozenset[Used]] = {}
"""By name, the attributes of `Federation` that an allocator uses and that need care: see `register_allocator`."""

_DECAY = 0.9
"""Weight of the past in the average of `Federation.movement`: it remembers about ten rounds. Not tuned."""
_UNIFORM_SHARE = 0.5
"""Share of equal chances in those of `importance`: no block has less than half its equal chance. Not tuned."""


def register_allocator(name: str, *, uses: Collection[Used] = ()) -> Callable[[Allocator], Allocator]:
    """Decorate an `Allocator`, to make it `method.allocation` `name` of configurations.

    Args:
        name: of the allocation.
        uses: what it uses of `Federation`: `movement`, which the method then measures and keeps in checkpoints; or
            `rounds`, whose number a resumed run then cannot change.

    Raises:
        InputError: there is an allocator of that name, or `uses` has an unknown entry.
    """
    if unknown := set(uses) - set(get_args(Used)):
        raise InputError(f"uses: found {min(unknown)!r}, expected some of {', '.join(get_args(Used))}")
    put = registering(ALLOCATORS, "method.allocation", name)
    USES[name] = frozenset(uses)
    return put


@register_allocator("uniform")
def _uniform(round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, *_: object) -> Allocation:
    """FedRA (arXiv 2311.11227): each client draws a uniform set of blocks."""
    return uniform_allocation(capacities, depth, rng)[participants]


_reference = lru_cache(maxsize=4)(ReferenceAllocation)


@register_allocator("reference")
def _as_published(
    round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, known: Federation
) -> Allocation:
    """FedRA's published code: the same distribution from one legacy stream over all rounds."""
    return _reference(tuple(capacities.tolist()), depth, known.seed)(round)[participants]


@register_allocator("covered")
def _covered(
    round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, known: Federation
) -> Allocation:
    """Ours: `uniform`, repaired so that the participants hold every block if their capacities allow it."""
    drawn = uniform_allocation(capacities, depth, rng)[participants]
    return repair_coverage(drawn, generator(known.seed, round=round, purpose="coverage"))


@register_allocator("prefix")
def _prefix(round: int, capacities: Integers, participants: Integers, depth: int, *_: object) -> Allocation:
    """InclusiveFL (KDD 2022) and DepthFL (ICLR 2023): the first blocks."""
    return prefix_allocation(capacities[participants], depth)


@register_allocator("full")
def _full(round: int, capacities: Integers, participants: Integers, depth: int, *_: object) -> Allocation:
    """All blocks, whatever the capacities: FedAvg's, as the methods that combine factors define it."""
    return np.ones((len(participants), depth), dtype=np.bool_)


@register_allocator("first")
def _first(round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, *_: object) -> Allocation:
    """Ours: the first block always, the others uniform."""
    return uniform_allocation(capacities, depth, rng, always=(0,))[participants]


@register_allocator("ends")
def _ends(round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, *_: object) -> Allocation:
    """Ours: the first and the last block always (of capacity 1, the first), the others uniform."""
    return uniform_allocation(capacities, depth, rng, always=(0, depth - 1))[participants]


@register_allocator("rotated")
def _rotated(round: int, capacities: Integers, participants: Integers, depth: int, *_: object) -> Allocation:
    """FedRolex (Alam et al., NeurIPS 2022; arXiv 2212.01548), over blocks instead of channels.

    All clients' windows of successive blocks begin at block r mod L in round r, and go on at the first after the last.
    """
    return (np.arange(depth) - round) % depth < capacities[participants, None]


@register_allocator("growing", uses=["rounds"])
def _growing(
    round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, known: Federation
) -> Allocation:
    """Ours, after the stages of DevFT: `uniform`, of 1 block in the first round and c = capacity from half the run on.

    In round r of R there are 1 + min(c − 1, ⌊2 (c − 1) r / R⌋) blocks.
    """
    grown = 1 + np.minimum(capacities - 1, 2 * (capacities - 1) * round // known.rounds)
    return uniform_allocation(grown, depth, rng)[participants]


@register_allocator("importance", uses=["movement"])
def _importance(
    round: int, capacities: Integers, participants: Integers, depth: int, rng: Rng, known: Federation
) -> Allocation:
    """Ours: blocks drawn without replacement, with chances that rise with `Federation.movement`.

    Half of a block's chance is equal for all blocks, half in proportion to its movement; a block that nobody has
    trained yet counts as the mean of the others.
    """
    chances, movement = np.full(depth, 1 / depth), known.movement
    if movement is not None and not np.isnan(movement).all():
        moved = np.where(np.isnan(movement), np.nanmean(movement), movement)
        chances = _UNIFORM_SHARE * chances + (1 - _UNIFORM_SHARE) * moved / moved.sum()
    return weighted_allocation(capacities, chances, rng)[participants]


def average_movement(known: NDArray[np.float64] | None, norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """`Federation.movement` after a round in which the adapters of each block moved by `norms` [blocks].

    A block that has not moved keeps its average, as nobody trained it.
    """
    past = np.full(len(norms), np.nan) if known is None else known
    average = np.where(np.isnan(past), norms, _DECAY * past + (1 - _DECAY) * norms)
    return np.where(norms > 0, average, past)

"""The order in which clients are trained, and their division among processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedra_engine.federation.allocation import Allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import LocalWork
from fedra_engine.runtime.processes import Processes

_REMEMBERED = 0.5
"""Decay of earlier rounds in the pace of a process, so that one slow round is soon forgotten."""


def longest_first(allocation: Allocation, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of `allocation` [participants, blocks] by falling cost, blocks × local `steps`; ties in row order.

    With the longest first, the last lanes end close together (longest processing time rule).
    """
    return np.argsort(-allocation.sum(axis=1) * steps, kind="stable")


def predicted_costs(allocation: Allocation, work: LocalWork, lengths: Tensor | None) -> NDArray[np.float64]:
    """Relative cost of each participant's training, float64 [participants]: blocks × local steps × tokens of a step.

    `lengths` int64 [samples] are the tokens of each training sample; None where all have the same length.
    """
    clients = work.participants
    step_samples = np.minimum(work.clients.sample_counts(clients), work.training.batch_size).astype(np.float64)
    if lengths is not None:
        step_samples *= [float(lengths[work.clients.samples[client]].double().mean()) for client in clients.tolist()]
    return allocation.sum(axis=1) * work.steps() * step_samples


def balance(costs: NDArray[np.float64], pace: NDArray[np.float64]) -> NDArray[np.int64]:
    """Assign participants to processes, int64 [participants].

    In order of falling `costs` [participants], each goes to the process where it ends earliest (longest processing time
    rule; Graham, 1969). `pace` [processes] is the time of each process for a unit of cost; only the ratios matter.
    """
    owners = np.empty(len(costs), dtype=np.int64)
    loads = np.zeros(len(pace))
    for participant in np.argsort(-costs, kind="stable").tolist():
        process = int(np.argmin((loads + costs[participant]) * pace))
        owners[participant] = process
        loads[process] += costs[participant]
    return owners


class Pace:
    """The speed of each process, from predicted costs and measured seconds."""

    def __init__(self, processes: int) -> None:
        self._costs = np.zeros(processes)
        self._seconds = np.zeros(processes)

    def learn(self, costs: NDArray[np.float64], seconds: NDArray[np.float64]) -> None:
        """Add a round in which the processes trained `costs` [processes] in `seconds` [processes]."""
        self._costs = _REMEMBERED * self._costs + costs
        self._seconds = _REMEMBERED * self._seconds + seconds

    def seconds_per_cost(self) -> NDArray[np.float64]:
        """Pace of each process, [processes]; the mean pace where it is not known."""
        known = self._costs > 0
        if not known.any():
            return np.ones_like(self._costs)
        pace = np.full_like(self._costs, self._seconds[known].sum() / self._costs[known].sum())
        pace[known] = self._seconds[known] / self._costs[known]
        return pace


class WorkDivision:
    """Divides every round's participants among the processes by `predicted_costs`.

    The division changes how updates are rounded, because clients that are trained together share products.
    """

    def __init__(self, processes: Processes, lengths: Tensor | None, *, by_cost_alone: bool = False) -> None:
        """With `by_cost_alone` all processes count as equally fast.

        Then a repeated or resumed run divides as before. Also for sharded models, whose processes wait for one another
        in every pass, so that times say nothing.
        """
        self._by_cost_alone = by_cost_alone
        self._processes = processes
        self._lengths = lengths
        self._pace = Pace(processes.count)

    @contextmanager
    def share(self, work: LocalWork, assignment: Assignment) -> Iterator[tuple[LocalWork, Assignment]]:
        """Give this process its part of a round; leaving the context waits for all processes.

        Raises:
            InputError: a process found bad input while it trained.
        """
        if self._processes.count == 1:
            yield work, assignment
            return
        costs = predicted_costs(assignment.held, work, self._lengths)
        # All processes know the same pace, so all divide the same way.
        pace = np.ones(self._processes.count) if self._by_cost_alone else self._pace.seconds_per_cost()
        owners = balance(costs, pace)
        mine = np.flatnonzero(owners == self._processes.index)
        started = time.perf_counter()
        with self._processes.raise_on_all():
            yield replace(work, participants=work.participants[mine]), assignment.select(mine)
            seconds = time.perf_counter() - started
        if self._by_cost_alone:
            return
        spent = np.bincount(owners, weights=costs, minlength=self._processes.count).astype(np.float64)
        self._pace.learn(spent, np.array(self._processes.all_gather_object(seconds), dtype=np.float64))

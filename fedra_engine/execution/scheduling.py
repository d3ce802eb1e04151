"""Who is trained when, and by which process."""

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
"""Weight of the rounds before in the pace of a process, so that one slow round is soon forgotten."""


def longest_first(allocation: Allocation, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of `allocation` [participants, blocks] by falling cost, blocks × local steps; ties in row order.

    With the long ones first, the lanes of the last wave end close together (longest processing time rule).
    """
    return np.argsort(-allocation.sum(axis=1) * steps, kind="stable")


def predicted_costs(allocation: Allocation, work: LocalWork, lengths: Tensor | None) -> NDArray[np.float64]:
    """What each participant's training costs relative to the others: blocks × local steps × tokens of a step.

    `lengths` int64 [samples] are the tokens of each training sample; None where all have equally many.
    """
    clients = work.participants
    step_samples = np.minimum(work.clients.sample_counts(clients), work.training.batch_size).astype(np.float64)
    if lengths is not None:
        step_samples *= [float(lengths[work.clients.samples[client]].double().mean()) for client in clients.tolist()]
    return allocation.sum(axis=1) * work.steps() * step_samples


def balance(costs: NDArray[np.float64], pace: NDArray[np.float64]) -> NDArray[np.int64]:
    """The process that trains each participant, int64 [participants].

    Those of highest `costs` first, each where it ends earliest (longest processing time rule; Graham, 1969). `pace`
    [processes] is the predicted time of each process for a unit of cost; only the ratios matter.
    """
    owners = np.empty(len(costs), dtype=np.int64)
    loads = np.zeros(len(pace))
    for participant in np.argsort(-costs, kind="stable").tolist():
        process = int(np.argmin((loads + costs[participant]) * pace))
        owners[participant] = process
        loads[process] += costs[participant]
    return owners


class Pace:
    """How fast each process is: predicted costs against measured seconds."""

    def __init__(self, processes: int) -> None:
        self._costs = np.zeros(processes)
        self._seconds = np.zeros(processes)

    def learn(self, costs: NDArray[np.float64], seconds: NDArray[np.float64]) -> None:
        """Remember a round in which the processes trained `costs` [processes] in `seconds` [processes]."""
        self._costs = _REMEMBERED * self._costs + costs
        self._seconds = _REMEMBERED * self._seconds + seconds

    def seconds_per_cost(self) -> NDArray[np.float64]:
        """[processes]; a process that has trained nobody yet is as fast as the others together."""
        known = self._costs > 0
        if not known.any():
            return np.ones_like(self._costs)
        pace = np.full_like(self._costs, self._seconds[known].sum() / self._costs[known].sum())
        pace[known] = self._seconds[known] / self._costs[known]
        return pace


class WorkDivision:
    """Divides the participants of every round among the processes, by `predicted_costs`.

    Who trains a client changes how its update is rounded, because clients that are trained together share products.
    """

    def __init__(self, processes: Processes, lengths: Tensor | None, *, by_cost_alone: bool = False) -> None:
        """With `by_cost_alone` processes count as equally fast, whatever time they take.

        So a run that is repeated or resumed divides as before; and where processes wait for one another in every pass,
        times tell nothing.
        """
        self._by_cost_alone = by_cost_alone
        self._processes = processes
        self._lengths = lengths
        self._pace = Pace(processes.count)

    @contextmanager
    def share(self, work: LocalWork, assignment: Assignment) -> Iterator[tuple[LocalWork, Assignment]]:
        """What this process is to train of a round. Ends when all processes have trained theirs.

        Raises:
            InputError: some process found bad input while it trained.
        """
        if self._processes.count == 1:
            yield work, assignment
            return
        costs = predicted_costs(assignment.held, work, self._lengths)
        # All processes have learnt the same, so all divide the same way.
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

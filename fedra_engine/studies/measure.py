"""Time rounds and local steps.

Each point is measured by `python -m fedra_engine.studies.measure <point's folder> <threads> <seconds>`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config.parsing import quiet_libraries, read_config
from fedra_engine.costs.model import processed_samples
from fedra_engine.execution.banks import SpareBanks
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.scheduling import balance, longest_first, predicted_costs
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.sharding import Sharding
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.exit_codes import end, exit_code
from fedra_engine.runtime.files import write_whole
from fedra_engine.runtime.processes import Processes, join_job
from fedra_engine.simulation import train_round
from fedra_engine.studies.measurements import MEASUREMENT, Measurement

_KIBIBYTE = 1024
"""Unit of `ru_maxrss`."""
_SERVER_SECONDS = 1.0
"""Duration of the measurement of rounds without training."""
_LONG_ENOUGH = 2.0
"""Seconds of a step beside which the extra cost of a first step does not matter."""


def main() -> None:
    """Measure the point whose configuration is in the folder, and write the measurement there."""
    path, threads, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    quiet_libraries()
    accelerator = join_job()
    torch.set_num_threads(threads)
    config = read_config(RunFolder.open(path).config_file)
    processes = Processes.of(accelerator)
    with processes.raise_on_all():
        experiment = build_experiment(config, accelerator.device, processes, Sharding.of(accelerator))
    measurement = measure(experiment, threads, seconds)
    if processes.is_main:
        write_whole(path / MEASUREMENT, json.dumps(asdict(measurement), indent=2) + "\n")


def measure(experiment: Experiment, threads: int, seconds: float) -> Measurement:
    """Measure rounds for `seconds` seconds, after a warm-up step."""
    processes = experiment.processes
    time_step(experiment)
    cpu_seconds, durations, state = _run_rounds(experiment, experiment.initial_state, 0, seconds)
    on_gpu = state.heads.is_cuda
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
    peaks = processes.all_gather_object((resident, torch.cuda.max_memory_allocated() if on_gpu else 0))
    all_cpu_seconds = sum(processes.all_gather_object(cpu_seconds)) / len(durations)
    started = time.process_time()
    work, assignment, _ = experiment.round_work(0)
    balance(predicted_costs(assignment.held, work, experiment.train_samples.lengths), np.ones(processes.count))
    repeated = time.process_time() - started
    costs = experiment.costs_of(work, assignment)
    sums = experiment.method.aggregator(state, 0).sums()
    idle = replace(experiment, executor=IdleExecutor(experiment.foundation, experiment.executor.lanes))
    idle_cpu_seconds, idle_durations, _ = _run_rounds(idle, state, len(durations), _SERVER_SECONDS)
    return Measurement(
        clients=len(experiment.clients),
        processes=processes.count,
        threads=threads,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        lanes=experiment.executor.lanes,
        steps=int(work.steps().sum()),
        rounds=len(durations),
        seconds=median(durations),
        busy_seconds=median(durations) * processes.count if on_gpu else all_cpu_seconds,
        server_seconds=sum(processes.all_gather_object(idle_cpu_seconds)) / len(idle_durations),
        repeated_seconds=repeated,
        memory=max(memory for memory, _ in peaks),
        gpu_memory=max(memory for _, memory in peaks),
        uploaded=float(costs.uploaded.sum()),
        downloaded=float(costs.downloaded.sum()),
        reduced=sum(tensor.nbytes for tensor in sums),
    )


def _run_rounds(
    experiment: Experiment, state: GlobalState, first: int, seconds: float
) -> tuple[float, list[float], GlobalState]:
    """Run rounds from `first` on, until `seconds` have passed on the main process.

    Returns CPU-seconds of this process, wall-clock seconds of each round, and the state after the last.
    """
    # There is no learning rate after the last round.
    rounds = experiment.config.rounds
    started, durations = time.process_time(), list[float]()
    while experiment.processes.broadcast_object(sum(durations) < seconds):
        state, round = train_round(experiment, state, (first + len(durations)) % rounds)
        durations.append(round.metrics.seconds)
    return time.process_time() - started, durations, state


class TimedStep(NamedTuple):
    """One local step of `clients` clients with `samples` samples took `seconds`, including the hand-out of adapters.

    At that rate per sample and block, the first round takes `round_seconds`.
    """

    clients: int
    samples: int
    seconds: float
    round_seconds: float


def time_step(experiment: Experiment) -> TimedStep:
    """Time one local step of the first round's participants; its updates are discarded.

    A step of one participant is followed by two steps of as many as there are lanes, of which the first is a warm-up; a
    slow step is the last.
    """
    # Participants whose updates would not arrive included, as there may be no others.
    whole, assignment = experiment.assigned_work(0)
    state = experiment.with_fresh_stand_ins(experiment.initial_state, 0, assignment)
    participants, training = whole.participants, whole.training
    first = np.sort(longest_first(assignment.held, whole.steps())[: experiment.executor.lanes])
    one_step = replace(training, max_local_steps=1)
    for timed in (first[:1], first, first):
        work = replace(whole, participants=participants[timed], training=one_step)
        _wait(experiment)
        started = time.perf_counter()
        for _ in experiment.executor.train(work, assignment.select(timed), state):
            pass
        _wait(experiment)
        seconds = time.perf_counter() - started
        if seconds > _LONG_ENOUGH:
            break
    counts = experiment.clients.sample_counts(participants)
    held = assignment.held.sum(axis=1)
    samples = processed_samples(counts[timed], one_step)
    all_rows = float(processed_samples(counts, training) @ held)
    rate = seconds / float(samples @ held[timed])
    return TimedStep(len(timed), int(samples.sum()), seconds, rate * all_rows)


def _wait(experiment: Experiment) -> None:
    """Wait for the GPU, if there is one."""
    if experiment.initial_state.heads.is_cuda:
        torch.cuda.synchronize()


class IdleExecutor:
    """Passes all clients through the lanes, with batches and adapters, but takes no steps."""

    def __init__(self, foundation: Foundation, lanes: int) -> None:
        self._foundation = foundation
        self.lanes = lanes
        self._spare = SpareBanks()

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """Yield every participant's initial adapters as its update."""
        pool = LanePool(work, assignment, state, self._foundation, lanes=self.lanes, spare=self._spare)
        while pool.refill():
            for lane in pool.in_training():
                lane.step = len(lane.batches)
            if updates := pool.take_finished():
                yield updates
        pool.end()


if __name__ == "__main__":
    end(exit_code(main))

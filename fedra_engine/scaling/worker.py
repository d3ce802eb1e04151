"""A process that measures a point: `python -m fedra_engine.scaling.worker <point's folder> <threads> <seconds>`."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator

from fedra_engine.benchmarks.server import train_nobody
from fedra_engine.cli import build_parser, parse_config, quiet_libraries
from fedra_engine.config import ExperimentConfig
from fedra_engine.costs import CostModel
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.scheduling import balance, predicted_costs
from fedra_engine.exit_codes import exit_code
from fedra_engine.experiment import Experiment
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import ClientUpdates, LocalWork
from fedra_engine.models.state import GlobalState
from fedra_engine.processes import join_job
from fedra_engine.reporting.console import Reporter
from fedra_engine.reporting.run_folder import RunFolder
from fedra_engine.scaling.measurement import Measurement, measurement_file
from fedra_engine.simulation import Simulation
from fedra_engine.step_timing import time_step

_KIBIBYTE = 1024
"""What `ru_maxrss` counts in."""
_SERVER_SECONDS = 1.0
"""For so long rounds are measured in which training costs nothing."""


def main() -> None:
    """Measure the point whose configuration the folder holds, and leave the measurement there."""
    path, threads, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    quiet_libraries()
    accelerator = join_job()
    torch.set_num_threads(threads)
    folder = RunFolder.open(path)
    config = parse_config(build_parser(ExperimentConfig, ""), ExperimentConfig, ["--config", str(folder.config_file)])
    measurement = MeasuredSimulation(config, folder, accelerator).measure(threads, seconds)
    if accelerator.is_main_process:
        measurement.write(measurement_file(path))


class MeasuredSimulation(Simulation):
    """A simulation of which only rounds are run, and measured."""

    def __init__(self, config: ExperimentConfig, folder: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, folder, Reporter.silent(), accelerator)
        self._state = self._experiment.initial_state
        self._round_number = 0

    def measure(self, threads: int, seconds: float) -> Measurement:
        """Measure rounds for `seconds` seconds, after a step that warms up kernels and allocators."""
        experiment, processes = self._experiment, self._processes
        time_step(experiment)
        cpu_seconds, durations = self._run_rounds(seconds)
        peaks = processes.all_gather_object((_resident_bytes(), _gpu_bytes()))
        rounds, on_gpu = len(durations), self._state.heads.is_cuda
        busy = median(durations) * processes.count if on_gpu else sum(processes.all_gather_object(cpu_seconds)) / rounds
        started = time.process_time()
        work, assignment, _ = experiment.round_work(0)
        balance(predicted_costs(assignment.held, work, experiment.train.lengths), np.ones(processes.count))
        repeated = time.process_time() - started
        costs = CostModel(experiment.foundation, experiment.train, self._config.lora, self._config.training).count(
            experiment.clients, work.participants, assignment, experiment.method
        )
        sums = experiment.method.aggregator(self._state, 0).sums()
        return Measurement(
            clients=len(experiment.clients),
            processes=processes.count,
            threads=threads,
            device=torch.cuda.get_device_name() if on_gpu else "cpu",
            lanes=experiment.lanes,
            steps=int(work.steps().sum()),
            rounds=rounds,
            seconds=median(durations),
            busy_seconds=busy,
            server_seconds=self._server_seconds(),
            repeated_seconds=repeated,
            memory=max(memory for memory, _ in peaks),
            gpu_memory=max(memory for _, memory in peaks),
            uploaded=float(costs.uploaded.sum()),
            downloaded=float(costs.downloaded.sum()),
            reduced=sum(tensor.nbytes for tensor in sums),
        )

    def _run_rounds(self, seconds: float) -> tuple[float, list[float]]:
        """Run rounds until `seconds` have passed on the main process; this process's CPU-seconds, and their times."""
        started, durations = time.process_time(), list[float]()
        while self._processes.broadcast_object(sum(durations) < seconds):
            durations.append(self._run_round())
        return time.process_time() - started, durations

    def _run_round(self) -> float:
        """Run the next round. Returns its wall-clock seconds."""
        # Beyond the last round there is no learning rate.
        self._state, metrics = self._round(self._round_number % self._config.rounds, self._state)
        self._round_number += 1
        return metrics.seconds

    def _server_seconds(self) -> float:
        """CPU-seconds of this process in a round in which training costs nothing, over all processes."""
        experiment = self._experiment
        self._experiment = replace(experiment, executor=_IdleExecutor(experiment))
        try:
            cpu_seconds, durations = self._run_rounds(_SERVER_SECONDS)
        finally:
            self._experiment = experiment
        return sum(self._processes.all_gather_object(cpu_seconds)) / len(durations)


class _IdleExecutor:
    """Does all that the sweep does around training, and trains nobody."""

    def __init__(self, experiment: Experiment) -> None:
        self._foundation = experiment.foundation
        self._lanes = experiment.lanes

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        """See `Executor.train`."""
        foundation = self._foundation
        pool = LanePool(work, assignment, state, foundation, lanes=self._lanes)
        return train_nobody(pool)


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE


def _gpu_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))

"""A process that measures a point: `python -m fedra_engine.scaling.worker <point's folder> <threads> <seconds>`."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fedra_engine.callbacks.console import Reporter
from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.parsing import quiet_libraries, read_config
from fedra_engine.commands.step_timing import time_step
from fedra_engine.costs.memory_model import CostModel
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.lanes import IdleExecutor
from fedra_engine.execution.scheduling import balance, predicted_costs
from fedra_engine.runtime.exit_codes import end, exit_code
from fedra_engine.runtime.processes import join_job
from fedra_engine.scaling.measurement import Measurement, measurement_file
from fedra_engine.simulation import Simulation

_KIBIBYTE = 1024
"""What `ru_maxrss` counts in."""
_SERVER_SECONDS = 1.0
"""How long rounds are measured in which training costs nothing."""


def main() -> None:
    """Measure the point whose configuration the folder holds, and leave the measurement there."""
    path, threads, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    quiet_libraries()
    accelerator = join_job()
    torch.set_num_threads(threads)
    folder = RunFolder.open(path)
    config = read_config(folder.config_file)
    simulation = Simulation(config, folder, Reporter.silent(), accelerator)
    measurement = measure(simulation, threads, seconds)
    if accelerator.is_main_process:
        measurement.write(measurement_file(path))


def measure(simulation: Simulation, threads: int, seconds: float) -> Measurement:
    """Measure rounds for `seconds` seconds, after a step that warms up kernels and allocators."""
    experiment, processes = simulation.experiment, simulation.processes
    config = experiment.config
    time_step(experiment)
    rounds = _Rounds(simulation)
    cpu_seconds, durations = rounds.run(seconds)
    peaks = processes.all_gather_object((_resident_bytes(), _gpu_bytes()))
    on_gpu = rounds.state.heads.is_cuda
    all_cpu_seconds = sum(processes.all_gather_object(cpu_seconds)) / len(durations)
    started = time.process_time()
    work, assignment, _ = experiment.round_work(0)
    balance(predicted_costs(assignment.held, work, experiment.train_samples.lengths), np.ones(processes.count))
    repeated = time.process_time() - started
    costs = CostModel(experiment.foundation, experiment.train_samples, config.lora, config.training).count(
        experiment.clients, work.participants, assignment, experiment.method
    )
    sums = experiment.method.aggregator(rounds.state, 0).sums()
    server_cpu_seconds, idle = rounds.run(
        _SERVER_SECONDS, IdleExecutor(experiment.foundation, lanes=experiment.executor.lanes)
    )
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
        server_seconds=sum(processes.all_gather_object(server_cpu_seconds)) / len(idle),
        repeated_seconds=repeated,
        memory=max(memory for memory, _ in peaks),
        gpu_memory=max(memory for _, memory in peaks),
        uploaded=float(costs.uploaded.sum()),
        downloaded=float(costs.downloaded.sum()),
        reduced=sum(tensor.nbytes for tensor in sums),
    )


class _Rounds:
    """Rounds of a simulation, each of which begins with the `state` that the one before left."""

    def __init__(self, simulation: Simulation) -> None:
        self.state = simulation.experiment.initial_state
        self._simulation = simulation
        self._next = 0

    def run(self, seconds: float, executor: Executor | None = None) -> tuple[float, list[float]]:
        """Run rounds until `seconds` have passed on the main process; see `Simulation.train_round`.

        Returns this process's CPU-seconds, and the wall-clock seconds of each round.
        """
        # Beyond the last round there is no learning rate.
        rounds = self._simulation.experiment.config.rounds
        started, durations = time.process_time(), list[float]()
        while self._simulation.processes.broadcast_object(sum(durations) < seconds):
            self.state, metrics = self._simulation.train_round(self._next % rounds, self.state, executor)
            self._next += 1
            durations.append(metrics.seconds)
        return time.process_time() - started, durations


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE


def _gpu_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


if __name__ == "__main__":
    end(exit_code(main))

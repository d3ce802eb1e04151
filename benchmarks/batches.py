"""What batches cost beside the training on them: every step of a real experiment, with the data in the cache."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.settings import CPU
from fedra_engine.config import ExperimentConfig
from fedra_engine.data.samples import Batch, Samples
from fedra_engine.execution.scheduling import longest_first
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.experiment import build_experiment
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.randomness import SampleDraws


@dataclass(frozen=True)
class BatchTimes:
    """Medians over the steps.

    Attributes:
        lanes: clients in a step.
        samples: samples of a step.
        batch: CPU-seconds to gather a step's inputs and labels, changed at random and normalised.
        step: CPU-seconds of the whole step, `batch` included.
    """

    lanes: int
    samples: int
    batch: float
    step: float

    def row(self) -> dict[str, Any]:
        """The fields and the share of the batches."""
        return asdict(self) | {"batch / step": f"{self.batch / self.step:.2%}"}


def measure_batches(config: ExperimentConfig, steps: int) -> BatchTimes:
    """Train `steps` local steps of the first round's participants, those with the most samples, on the CPU.

    The first step is not counted.

    Raises:
        InputError: something in the configuration cannot be used, or there are fewer participants than lanes.
    """
    experiment = build_experiment(config, CPU)
    whole, assignment, _ = experiment.round_work(0)
    participants = whole.participants
    # An experiment goes on without the lanes that stay empty; a measurement would not be the one asked for.
    lanes = experiment.executor.lanes if config.execution.lanes == "auto" else config.execution.lanes
    if len(participants) < lanes:
        raise InputError(
            f"execution.lanes: found {lanes} with {len(participants)} participants, expected at most as many"
        )
    # Epochs enough, so that no client ends before the others.
    training = replace(config.training, max_local_steps=steps + 1, local_epochs=steps + 1)
    counts = experiment.clients.sample_counts(participants)
    chosen = np.sort(longest_first(assignment.held, counts)[: experiment.executor.lanes])
    work = replace(whole, participants=participants[chosen], training=training)
    samples = _TimedSamples(experiment.train_samples)
    executor = SweepExecutor(
        experiment.foundation, experiment.sweep_model, samples, config.lora, lanes=experiment.executor.lanes
    )
    for _ in executor.train(work, assignment.select(chosen), experiment.initial_state):
        pass
    # A step lasts from one batch to the next.
    durations = np.diff([*samples.started, time.process_time()])
    return BatchTimes(
        lanes=experiment.executor.lanes,
        samples=round(median(samples.sizes)),
        batch=median(samples.seconds[1:]),
        step=float(np.median(durations[1:])),
    )


class _TimedSamples:
    """Samples that note when each batch was asked for, and what it took."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.started: list[float] = []
        self.seconds: list[float] = []
        self.sizes: list[int] = []

    @property
    def labels(self) -> Tensor:
        return self._samples.labels

    @property
    def domains(self) -> Tensor:
        return self._samples.domains

    @property
    def lengths(self) -> Tensor | None:
        return self._samples.lengths

    def digest(self) -> str:
        return self._samples.digest()

    def inputs(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return self._samples.inputs(rows, device, dtype)

    def batch(self, rows: Tensor, device: torch.device, dtype: torch.dtype, draws: SampleDraws | None = None) -> Batch:
        self.started.append(time.process_time())
        batch = self._samples.batch(rows, device, dtype, draws)
        self.seconds.append(time.process_time() - self.started[-1])
        self.sizes.append(len(rows))
        return batch

"""How long a local step takes, measured before any training."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedra_engine.costs.model import processed_samples
from fedra_engine.execution.scheduling import longest_first
from fedra_engine.experiment import Experiment

_LONG_ENOUGH = 2.0
"""Seconds of a step from which what only the first one costs does not matter."""


@dataclass(frozen=True)
class TimedStep:
    """One local step of as many of the first round's participants as are trained at a time, or of one if that is long.

    Attributes:
        clients: how many.
        samples: of all of them.
        seconds: wall-clock time, hand-out of the adapters included.
        round_seconds: what the whole round takes at that rate per sample and block.
    """

    clients: int
    samples: int
    seconds: float
    round_seconds: float


def time_step(experiment: Experiment) -> TimedStep:
    """Train one local step of copies that are then forgotten, and time it.

    Of one client first, and if that was quick of all; the first time of all is not counted unless it was long.
    """
    # Those that will not arrive, too: the step must be of somebody.
    whole, assignment = experiment.assigned_work(0)
    participants, training = whole.participants, whole.training
    first = np.sort(longest_first(assignment.held, whole.steps())[: experiment.executor.lanes])
    one_step = replace(training, max_local_steps=1)
    for timed in (first[:1], first, first):
        work = replace(whole, participants=participants[timed], training=one_step)
        _wait(experiment)
        started = time.perf_counter()
        for _ in experiment.executor.train(work, assignment.select(timed), experiment.initial_state):
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
    """Until the device has done all that it was asked to."""
    if experiment.initial_state.heads.is_cuda:
        torch.cuda.synchronize()

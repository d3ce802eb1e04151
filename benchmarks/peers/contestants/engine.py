"""This engine, built from its configuration: what a user's run does in a round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.handwritten import HandwrittenExecutor
from benchmarks.peers.export import named_state
from benchmarks.peers.job import HANDWRITTEN, Job, Loop
from benchmarks.peers.scenes import SCENES, build_scene
from benchmarks.peers.work import State
from fedra_engine.simulation import train_round
from fedra_engine.studies.measure import IdleExecutor


def serve(job: Job, loop: Loop) -> None:
    """Run rounds."""
    executor = "sequential" if job.executor == HANDWRITTEN else job.executor
    experiment = build_scene(SCENES[job.scene], Path(job.folder), job.dtype, job.attention, executor)
    if job.executor == HANDWRITTEN:
        experiment = replace(experiment, executor=HandwrittenExecutor(experiment.foundation, experiment.train_samples))
    if job.idle:
        experiment = replace(experiment, executor=IdleExecutor(experiment.foundation, experiment.executor.lanes))

    def run_round() -> State:
        state, _ = train_round(experiment, experiment.initial_state, 0)
        return named_state(experiment, state)

    loop(run_round)

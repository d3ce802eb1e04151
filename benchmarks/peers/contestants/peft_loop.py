"""A careful loop with PEFT: one client after another, in sub-models of one model that is loaded and wrapped once."""

from __future__ import annotations

from benchmarks.peers.job import Job, Loop
from benchmarks.peers.local_training import CachedModel, train_all
from benchmarks.peers.work import mean_over_holders


def serve(job: Job, loop: Loop) -> None:
    """Run rounds."""
    work = job.work()
    model = CachedModel(work, job.attention, job.precision)
    loop(lambda: mean_over_holders(work.state, train_all(model, work, work.state, idle=job.idle)))

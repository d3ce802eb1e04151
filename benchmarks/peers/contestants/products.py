"""The yardstick, not a contestant: the frozen products of one pass over the model, alone."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from benchmarks.peers.flops import shapes
from benchmarks.peers.job import Job, Loop
from benchmarks.peers.scenes import SCENES
from benchmarks.peers.work import State


def serve(job: Job, loop: Loop) -> None:
    """Run passes, with the samples of all clients at once."""
    scene = SCENES[job.scene]
    rows = scene.clients * scene.batch * scene.tokens
    weights = [torch.randn(shape, dtype=job.precision) for shape in shapes(scene)]
    values = {width: torch.randn(rows, width, dtype=job.precision) for width in (scene.width, 4 * scene.width)}

    @torch.no_grad()
    def run_pass() -> State:
        for weight in weights:
            linear(values[weight.shape[1]], weight)
            torch.mm(values[weight.shape[0]], weight)
        return {}

    loop(run_pass)

"""The yardstick, not a contestant: the frozen products of one pass over the model, alone."""

from __future__ import annotations

import torch

from benchmarks.peers.flops import shapes
from benchmarks.peers.job import Job, Loop
from benchmarks.peers.scenes import SCENES
from benchmarks.peers.work import State
from fedra_kernels import FrozenLinear


def serve(job: Job, loop: Loop) -> None:
    """Run passes, with the samples of all clients at once."""
    scene = SCENES[job.scene]
    rows = scene.clients * scene.batch * scene.tokens
    linears = [FrozenLinear(torch.randn(shape, dtype=job.precision), None) for shape in shapes(scene)]
    values = {width: torch.randn(rows, width, dtype=job.precision) for width in (scene.width, 4 * scene.width)}

    @torch.no_grad()
    def run_pass() -> State:
        for linear in linears:
            outputs, inputs = linear.weight.shape
            linear.forward(values[inputs])
            linear.backward(values[outputs])
        return {}

    loop(run_pass)

"""No contestant: the frozen products of one pass over the model, alone, for the rate that the processor reaches."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from benchmarks.peers.job import Job, Loop
from benchmarks.peers.scenes import SCENES, Scene
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


def shapes(scene: Scene) -> list[tuple[int, int]]:
    """Shapes [out, in] of all Linears of a model's blocks."""
    width = scene.width
    return [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * scene.depth


def pass_flops(scene: Scene) -> float:
    """Floating-point operations of such a pass: X·Wᵀ and dY·W of every Linear."""
    return 4.0 * scene.clients * scene.batch * scene.tokens * sum(out * size for out, size in shapes(scene))


def round_flops(scene: Scene) -> float:
    """The same for a round of the scene, in which each sample goes through its client's blocks alone."""
    capacities = [scene.capacities[client % len(scene.capacities)] for client in range(scene.clients)]
    per_client = 4.0 * scene.steps * scene.batch * scene.tokens * sum(out * size for out, size in shapes(scene))
    return per_client * sum(capacities) / scene.depth

"""Floating-point operations of the frozen products of a scene."""

from __future__ import annotations

from benchmarks.peers.scenes import Scene


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

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
    """Those that this engine computes in a round of the scene.

    Each sample goes through its client's blocks alone. In the last one of an image model, only the class token goes
    through the Linears after the attention; the first one's input needs no gradient, through query, key and value.
    """
    square, tokens = scene.width**2, scene.tokens
    of_sample = 0.0
    for client in range(scene.clients):
        depth = scene.capacities[client % len(scene.capacities)]
        left_out = 9 * 2 * square * (tokens - 1) if scene.task == "image" else 0
        of_sample += 4.0 * 12 * square * tokens * depth - 2 * left_out - 2 * 3 * square * tokens
    return of_sample * scene.steps * scene.batch

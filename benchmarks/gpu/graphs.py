"""Rounds whose local steps are CUDA graphs, beside the same rounds launched kernel by kernel."""

from __future__ import annotations

import torch

from benchmarks.gpu.findings import Figure, at_most
from benchmarks.gpu.sizes import Point
from benchmarks.gpu.workload import Workload, round_cost
from fedra_engine.models.state import GlobalState


def graph_figures(workload: Workload, point: Point) -> list[Figure]:
    """Times of a round of `point.graph_steps` steps, and how many of its values differ with graphs.

    On a CPU there are no graphs; the same is done without, and every line says so.
    """
    graphs = workload.device.type == "cuda"
    round = workload.round(point.lanes, samples=point.samples, steps=point.graph_steps)
    plain, graphed = workload.sweep(point.lanes), workload.sweep(point.lanes, graphs=graphs)
    expected, again = workload.train(plain, round), workload.train(plain, round)
    found = workload.train(graphed, round)
    without, with_graphs = (round_cost(workload, executor, round, repeats=3) for executor in (plain, graphed))
    name = f"{point.name}, {point.graph_steps} steps: {'CUDA graphs' if graphs else 'no CUDA graphs without a GPU'}"
    repeated, differing = differing_values(again, expected), differing_values(found, expected)
    title = f"{name}: values that differ"
    return [
        Figure(f"{name}: round without", 1000 * without.seconds, "ms"),
        Figure(f"{name}: round", 1000 * with_graphs.seconds, "ms"),
        Figure(f"{name}: peak memory", with_graphs.peak_gigabytes, "GB"),
        Figure(f"{name}: values that differ when a round without is repeated", repeated),
        # Where torch's own kernels add in any order, graphs can do no better.
        at_most(title, differing, 0) if repeated == 0 else Figure(title, differing),
    ]


def differing_values(found: GlobalState, expected: GlobalState) -> int:
    """Values of the adapters and heads that are not the same to the last bit; NaN equals NaN."""
    pairs = ((found.adapters, expected.adapters), (found.heads, expected.heads))
    return sum(int(((mine != other) & ~(torch.isnan(mine) & torch.isnan(other))).sum()) for mine, other in pairs)

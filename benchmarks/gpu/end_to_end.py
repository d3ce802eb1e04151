"""Whole rounds: the sweep against PEFT one client after another, beside what the counted work makes of them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.findings import Figure, Findings, StageFailed, at_least, at_most
from benchmarks.gpu.graphs import graph_figures
from benchmarks.gpu.library import library_peaks, product_rate
from benchmarks.gpu.shapes import expected_step_seconds
from benchmarks.gpu.sizes import Point, ReportSizes
from benchmarks.gpu.steps import StepCost, step_cost
from benchmarks.gpu.workload import Round, RoundCost, Workload, round_cost
from benchmarks.kernels.measure import name_and_message
from benchmarks.kernels.work import Peaks
from fedra_engine.execution.executor import Executor
from fedra_engine.runtime.errors import InputError

TARGET_SHARE = 40.0
MANY_CLIENTS, MANY_SECONDS, THEIR_IMAGES = 10_000, 25.0, 32
"""A round of so many clients with so many images should take no longer."""
MOST_TRITON, MOST_OTHERS = 540, 200
"""Launches of a training step of twelve fused blocks."""
_SECONDS_FOR_POINT = 10.0
"""What a point takes on a GPU, the model included: a guess; nothing has been measured."""
_SECONDS_FOR_GRAPHS = 5.0
"""The same for the rounds with CUDA graphs of a point, of which those of the embedded model come first."""


def end_to_end(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Measure every point, then CUDA graphs.

    Raises:
        StageFailed: the memory did not suffice for a point, or steps cannot be captured; the rest is there.
    """
    errors: list[str] = []
    graphed: list[tuple[Point, Workload]] = []
    for point in sizes.points:
        if findings.seconds_left < _SECONDS_FOR_POINT:
            findings.leave_out(point.name)
            continue
        try:
            workload = _measure_point(findings, sizes, device, point)
        except torch.OutOfMemoryError as error:
            errors.append(f"{point.name}: {name_and_message(error)}")
            continue
        if point.graph_steps:
            graphed.append((point, workload))
    # Last, as a capture that fails may leave nothing else working.
    for point, workload in reversed(graphed):
        if findings.seconds_left < _SECONDS_FOR_GRAPHS:
            findings.leave_out(f"{point.name}: CUDA graphs")
            continue
        try:
            for figure in graph_figures(workload, point):
                findings.figure(figure)
        except (torch.OutOfMemoryError, InputError) as error:
            errors.append(f"{point.name}: CUDA graphs: {name_and_message(error)}")
    if errors:
        raise StageFailed("; ".join(errors))


def _measure_point(findings: Findings, sizes: ReportSizes, device: torch.device, point: Point) -> Workload:
    workload = Workload.embedded(device) if point.shape is None else Workload.random(point.shape, device, sizes.dtype)
    round = workload.round(2 * point.lanes, images=point.images, steps=point.steps)
    cost = _cost(workload, workload.sweep(point.lanes), round)
    row: dict[str, Any] = {
        "point": point.name,
        "clients": 2 * point.lanes,
        "steps": point.steps,
        "seconds": cost.seconds,
        "clients_per_second": 2 * point.lanes / cost.seconds,
        "tflops": workload.flops(round) / cost.seconds / 1e12,
        "peak_gigabytes": cost.peak_gigabytes,
        "blocks_fused": workload.sweep_model.fused,
    }
    step = step_cost(workload, lanes=point.lanes, images=point.images)
    row |= {"host_seconds_per_step": step.host, "gpu_seconds_per_step": step.gpu}
    findings.figure(_fused_figure(point, workload.sweep_model.fused))
    for figure in _round_figures(findings, sizes, device, workload, point, round, cost, row):
        findings.figure(figure)
    for figure in step_figures(point, step, device):
        findings.figure(figure)
    _step_rows(findings, point, step)
    baseline = workload.round(point.sequential, images=point.images, steps=point.steps)
    row["peft_clients_per_second"] = point.sequential / _cost(workload, workload.sequential(), baseline, 1).seconds
    findings.row("rounds", row)
    ratio = row["clients_per_second"] / row["peft_clients_per_second"]
    findings.figure(Figure(f"{point.name}: over PEFT one client after another", ratio, "×"))
    return workload


def _cost(workload: Workload, executor: Executor, round: Round, repeats: int = 3) -> RoundCost:
    workload.train(executor, round)
    return round_cost(workload, executor, round, repeats=repeats)


def _round_figures(
    findings: Findings,
    sizes: ReportSizes,
    device: torch.device,
    workload: Workload,
    point: Point,
    round: Round,
    cost: RoundCost,
    row: dict[str, Any],
) -> list[Figure]:
    shape, name = workload.shape, point.name
    figures = []
    rate = row["clients_per_second"]
    if point.shape is None:
        # Launch-bound: no share of a rate says anything.
        figures.append(Figure(f"{name}: clients", rate, "1/s"))
    else:
        peak = product_rate(findings.folder, sizes, device, shape, point.lanes * point.images * shape.tokens)
        held = float(round.allocation.mean())
        peaks = Peaks("measured", peak, library_peaks(findings.folder, sizes, device).bandwidth)
        expected = (
            2
            * point.steps
            * expected_step_seconds(shape, lanes=point.lanes, images=point.images, held=held, peaks=peaks)
        )
        row |= {"library_tflops": peak / 1e12, "expected_seconds": expected}
        share = 100 * row["tflops"] * 1e12 / peak
        expected_share = 100 * workload.flops(round) / expected / peak
        figures.append(Figure(f"{name}: clients", rate, "1/s", expected=2 * point.lanes / expected))
        title = f"{name}: share of torch's products' rate at these shapes"
        # The target is for a batch that fills the GPU.
        if point == sizes.points[0]:
            figures.append(at_least(title, share, TARGET_SHARE, "%", expected=expected_share))
        else:
            figures.append(Figure(title, share, "%", expected=expected_share))
        if point.images * point.steps == THEIR_IMAGES:
            title = f"{MANY_CLIENTS:,} clients with {THEIR_IMAGES} images, extrapolated from {name}"
            seconds, those = MANY_CLIENTS / rate, MANY_CLIENTS * expected / (2 * point.lanes)
            figures.append(at_most(title, seconds, MANY_SECONDS, "s", expected=those))
    figures.append(Figure(f"{name}: peak memory", cost.peak_gigabytes, "GB"))
    return figures


def _fused_figure(point: Point, fused: int) -> Figure:
    name = f"{point.name}: blocks fused"
    if point.shape is None:
        return Figure(name, fused)
    return Figure(name, fused, "", str(point.shape.depth), fused == point.shape.depth)


def step_figures(point: Point, step: StepCost, device: torch.device) -> list[Figure]:
    """Times of a step, and on a GPU its launches and synchronizations beside their targets."""
    figures = [Figure(f"{point.name}: host time of a step", 1000 * step.host, "ms")]
    if device.type != "cuda":
        return figures
    waits = step.synchronizations.total()
    return [
        *figures,
        Figure(f"{point.name}: GPU time of a step", 1000 * step.gpu, "ms"),
        at_most(f"{point.name}: Triton launches of a step", step.triton.total(), MOST_TRITON),
        at_most(f"{point.name}: other kernels of a step", step.others.total(), MOST_OTHERS),
        Figure(f"{point.name}: copies and fills of a step", step.copies.total()),
        at_most(f"{point.name}: synchronizations of a step", waits, 0),
    ]


def _step_rows(findings: Findings, point: Point, step: StepCost) -> None:
    for name, launches, seconds in step.longest:
        row = {"point": point.name, "kernel": name[:100], "launches": launches, "milliseconds": 1000 * seconds}
        findings.row("longest kernels of a step", row)
    for table, counts in (("copies of a step", step.copies), ("synchronizations of a step", step.synchronizations)):
        for name, count in counts.most_common():
            findings.row(table, {"point": point.name, "what": name, "count": count})
    for name, count in step.triton.most_common():
        findings.row("Triton launches of a step", {"point": point.name, "kernel": name, "count": count})
    for name, count in step.others.most_common(30):
        findings.row("other kernels of a step", {"point": point.name, "kernel": name[:100], "count": count})

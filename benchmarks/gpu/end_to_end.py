"""Whole rounds: the sweep against PEFT one client after another, beside what the counted work makes of them."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cost.step import ExpectedStep, count_step
from benchmarks.gpu.findings import Figure, Findings, StageFailed, at_least, at_most, beside_expected
from benchmarks.gpu.graphs import graph_figures
from benchmarks.gpu.library import library_peaks, product_rate
from benchmarks.gpu.sizes import Point, ReportSizes
from benchmarks.gpu.steps import StepCost, step_cost
from benchmarks.gpu.workload import Round, RoundCost, Workload, round_cost
from benchmarks.kernels.measure import name_and_message
from benchmarks.kernels.work import Peaks
from fedra_engine.execution.executor import Executor
from fedra_engine.runtime.errors import InputError
from fedra_kernels.dispatch import architecture

TARGET_SHARE = 40.0
MANY_CLIENTS, MANY_SECONDS, THEIR_IMAGES = 10_000, 25.0, 32
"""A round of so many clients with so many images should take no longer."""
MOST_TRITON, MOST_OTHERS = 285, 120
"""Launches of a training step of twelve fused blocks: a tenth above the 259 counted (docs/kernels.md), and nearly twice
the 66 of torch's ops, some of which launch several kernels."""
_LEAST_SHARE = 0.01
"""Of a step's expected time; ops that should take less are not compared one by one."""
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
    round = workload.round(2 * point.lanes, samples=point.samples, steps=point.steps)
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
    expected = _expected_step(findings, sizes, device, point)
    step = step_cost(workload, lanes=point.lanes, samples=point.samples)
    row |= {"host_seconds_per_step": step.host, "gpu_seconds_per_step": step.gpu}
    findings.figure(_fused_figure(point, workload.sweep_model.fused))
    for figure in _round_figures(workload.flops(round), sizes.points[0] == point, point, expected, cost, row):
        findings.figure(figure)
    for figure in step_figures(point, step, expected, device):
        findings.figure(figure)
    _step_rows(findings, point, step, expected)
    baseline = workload.round(point.sequential, samples=point.samples, steps=point.steps)
    row["peft_clients_per_second"] = point.sequential / _cost(workload, workload.sequential(), baseline, 1).seconds
    findings.row("rounds", row)
    ratio = row["clients_per_second"] / row["peft_clients_per_second"]
    findings.figure(Figure(f"{point.name}: over PEFT one client after another", ratio, "×"))
    return workload


def _cost(workload: Workload, executor: Executor, round: Round, repeats: int = 3) -> RoundCost:
    workload.train(executor, round)
    return round_cost(workload, executor, round, repeats=repeats)


def _expected_step(findings: Findings, sizes: ReportSizes, device: torch.device, point: Point) -> ExpectedStep | None:
    """The point's counted step at the rates that torch reaches at its shapes; None for the embedded model.

    That one is bound by launches, of which bytes and FLOPs say nothing.
    """
    shape = point.shape
    if shape is None:
        return None
    flops = product_rate(findings.folder, sizes, device, shape, point.lanes * point.samples * shape.tokens)
    peaks = Peaks("measured", flops, library_peaks(findings.folder, sizes, device).bandwidth)
    count = count_step(
        shape, lanes=point.lanes, samples=point.samples, dtype=sizes.dtype, architecture=architecture(device)
    )
    return ExpectedStep(count, peaks)


def _round_figures(
    flops: float, fills: bool, point: Point, step: ExpectedStep | None, cost: RoundCost, row: dict[str, Any]
) -> list[Figure]:
    """What is said of a round of so many `flops`; the targets are for a batch that `fills` the GPU."""
    name, rate = point.name, row["clients_per_second"]
    memory = Figure(f"{name}: peak memory", cost.peak_gigabytes, "GB")
    if step is None:
        return [Figure(f"{name}: clients", rate, "1/s"), memory]
    peak, expected = step.peaks.flops, 2 * point.steps * step.seconds
    row |= {"library_tflops": peak / 1e12, "expected_seconds": expected}
    share, expected_share = 100 * row["tflops"] * 1e12 / peak, 100 * flops / expected / peak
    figures = [Figure(f"{name}: clients", rate, "1/s", expected=2 * point.lanes / expected)]
    title = f"{name}: share of torch's products' rate at these shapes"
    if fills:
        figures.append(at_least(title, share, TARGET_SHARE, "%", expected=expected_share))
    else:
        figures.append(Figure(title, share, "%", expected=expected_share))
    if point.samples * point.steps == THEIR_IMAGES:
        title = f"{MANY_CLIENTS:,} clients with {THEIR_IMAGES} images, extrapolated from {name}"
        seconds, those = MANY_CLIENTS / rate, MANY_CLIENTS * expected / (2 * point.lanes)
        figures.append(at_most(title, seconds, MANY_SECONDS, "s", expected=those))
    return [*figures, memory]


def _fused_figure(point: Point, fused: int) -> Figure:
    name = f"{point.name}: blocks fused"
    if point.shape is None:
        return Figure(name, fused)
    return Figure(name, fused, "", str(point.shape.depth), fused == point.shape.depth)


def step_figures(point: Point, step: StepCost, expected: ExpectedStep | None, device: torch.device) -> list[Figure]:
    """Times of a step, and on a GPU its launches and synchronizations beside their targets."""
    figures = [Figure(f"{point.name}: host time of a step", 1000 * step.host, "ms")]
    if device.type != "cuda":
        return figures
    waits = step.synchronizations.total()
    milliseconds = None if expected is None else 1000 * expected.seconds
    launches = None if expected is None else expected.count.of(ours=True).launches
    return [
        *figures,
        Figure(f"{point.name}: GPU time of a step", 1000 * step.gpu, "ms", expected=milliseconds),
        at_most(f"{point.name}: Triton launches of a step", step.triton.total(), MOST_TRITON, expected=launches),
        at_most(f"{point.name}: other kernels of a step", step.others.total(), MOST_OTHERS),
        Figure(f"{point.name}: copies and fills of a step", step.copies.total()),
        at_most(f"{point.name}: synchronizations of a step", waits, 0),
    ]


def _step_rows(findings: Findings, point: Point, step: StepCost, expected: ExpectedStep | None) -> None:
    for row in [] if expected is None else op_rows(point, step, expected):
        findings.row("ops of a step", row)
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


def op_rows(point: Point, step: StepCost, expected: ExpectedStep) -> list[dict[str, Any]]:
    """The ops of a profiled step that should take the most time, measured beside expected."""
    rows = []
    for op in expected.count.ops:
        count = expected.count.of(op)
        # Autograd adds up gradients in place where nobody else holds them, but not while it is counted.
        names = {op, f"{op.removesuffix('_')}_", op.removesuffix("_")} if op.startswith("aten::") else {op}
        measured = sum(step.ops.get(name, 0.0) for name in names)
        seconds = count.seconds(expected.peaks)
        if measured and seconds >= _LEAST_SHARE * expected.seconds:
            row = {"point": point.name, "op": op, "launches": count.launches, "seconds": measured}
            rows.append(row | beside_expected(measured, seconds))
    return rows

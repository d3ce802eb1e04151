"""How a round's time and memory grow with the number of clients."""

from __future__ import annotations

import torch

from benchmarks.gpu.findings import Figure, Findings
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.gpu.workload import Workload, round_cost


def client_scaling(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Seconds and memory of a round of ever more clients with one local step each, in the same lanes."""
    lanes, samples = sizes.scaling_lanes, sizes.scaling_samples
    workload = Workload.random(sizes.scaling_shape, device, sizes.dtype)
    executor = workload.sweep(lanes)
    workload.train(executor, workload.round(lanes, samples=samples, steps=1))
    seconds_per_client = 0.0
    for count in sizes.scaling:
        name = f"round of {count:,} clients × {samples} images"
        if seconds_per_client * count * 1.2 > findings.seconds_left:
            findings.leave_out(name)
            continue
        cost = round_cost(workload, executor, workload.round(count, samples=samples, steps=1), repeats=1)
        seconds_per_client = cost.seconds / count
        row = {"clients": count, "lanes": lanes, "samples": samples, "seconds": cost.seconds}
        row |= {"clients_per_second": count / cost.seconds, "peak_gigabytes": cost.peak_gigabytes}
        findings.row("clients", row)
        findings.figure(Figure(name, count / cost.seconds, "clients/s"))
        findings.figure(Figure(f"{name}: peak memory", cost.peak_gigabytes, "GB"))

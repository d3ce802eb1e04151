"""Whole rounds: the sweep against PEFT one client after another, and how both numbers of clients scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedra_engine.benchmarks.gpu.findings import Figure, Findings, StageFailed, at_least
from fedra_engine.benchmarks.gpu.workload import Round, RoundCost, VitShape, Workload, round_cost
from fedra_engine.benchmarks.kernels.measure import TIME_UP, measured_peaks, name_and_message
from fedra_engine.execution.executor import Executor

TARGET_IMAGES = 16
TARGET_SHARE = 40.0
_IMAGES_PER_PASS = 1024
"""Images that go through a pass of the sweep together; what fits the memory of an 80 GB GPU."""
_MAX_LANES = 256
_POINT_SECONDS = 12.0
"""What the figures of one number of images take."""


def lanes_for(images: int) -> int:
    """Lanes at `images` images per client and step: 64 at 16."""
    return max(min(_IMAGES_PER_PASS // images, _MAX_LANES), 1)


def end_to_end(
    findings: Findings,
    device: torch.device,
    dtype: torch.dtype,
    shape: VitShape,
    *,
    images: Sequence[int] = (TARGET_IMAGES, 1, 4, 32),
    lanes: Callable[[int], int] = lanes_for,
    gemm_size: int = 8192,
    sequential_clients: int = 6,
    steps: int = 2,
) -> None:
    """Clients a second of both executors at each number of `images` a step; FLOPs over the measured product's rate."""
    peak = measured_peaks(device, dtype, size=gemm_size).flops
    findings.figure(Figure("measured GEMM rate", peak / 1e12, "TFLOP/s"))
    errors: list[str] = []
    workload = Workload(shape, device, dtype)
    for count in images:
        if findings.seconds_left < _POINT_SECONDS:
            findings.row("end to end", {"images": count, "error": TIME_UP})
            continue
        row = _sweep_row(workload, count, lanes(count), steps, peak, errors)
        if "clients_per_second" in row:
            baseline = workload.round(sequential_clients, images=count, steps=steps)
            cost = _attempt(workload, workload.sequential(), baseline, errors)
            if cost is not None:
                row["sequential_clients_per_second"] = sequential_clients / cost.seconds
                row["ratio"] = row["clients_per_second"] / row["sequential_clients_per_second"]
                findings.figure(Figure(f"sweep over sequential PEFT, {count} images per step", row["ratio"], "×"))
        findings.row("end to end", row)
        if count == TARGET_IMAGES and "share_percent" in row:
            name = f"sweep, {row['lanes']} lanes × {count} images: share of the GEMM rate"
            findings.figure(at_least(name, row["share_percent"], TARGET_SHARE, "%"))
            findings.figure(Figure("same: clients", row["clients_per_second"], "1/s"))
            findings.figure(Figure("same: peak memory", row["peak_gigabytes"], "GB"))
    if TARGET_IMAGES in images and findings.seconds_left > _POINT_SECONDS:
        _with_pixels_on_device(findings, workload, device, dtype, lanes(TARGET_IMAGES), steps, peak, errors)
    if errors:
        raise StageFailed("; ".join(errors))


def _with_pixels_on_device(
    findings: Findings,
    host: Workload,
    device: torch.device,
    dtype: torch.dtype,
    lanes: int,
    steps: int,
    peak: float,
    errors: list[str],
) -> None:
    """What copying the images to the device costs: the same round with the images there already."""
    workload = Workload(host.shape, device, dtype, pixels_on_device=True)
    row = _sweep_row(workload, TARGET_IMAGES, lanes, steps, peak, errors)
    findings.row("end to end", row | {"pixels": "device"})
    if "share_percent" in row:
        findings.figure(Figure("same with the images on the device: share", row["share_percent"], "%"))


def _sweep_row(
    workload: Workload, images: int, lanes: int, steps: int, peak: float, errors: list[str]
) -> dict[str, Any]:
    round = workload.round(2 * lanes, images=images, steps=steps)
    row: dict[str, Any] = {"images": images, "lanes": lanes, "clients": 2 * lanes, "steps": steps, "pixels": "host"}
    cost = _attempt(workload, workload.sweep(lanes), round, errors)
    if cost is None:
        return row | {"error": errors[-1]}
    rate = workload.flops(round) / cost.seconds
    return row | {
        "seconds": cost.seconds,
        "clients_per_second": 2 * lanes / cost.seconds,
        "tflops": rate / 1e12,
        "share_percent": 100 * rate / peak,
        "peak_gigabytes": cost.peak_gigabytes,
    }


def _attempt(workload: Workload, executor: Executor, round: Round, errors: list[str]) -> RoundCost | None:
    """The cost of a round after one to warm up, or None where the memory does not suffice."""
    try:
        workload.train(executor, round)
        return round_cost(workload, executor, round)
    except torch.OutOfMemoryError as error:
        errors.append(name_and_message(error))
        return None


def client_scaling(
    findings: Findings,
    device: torch.device,
    dtype: torch.dtype,
    shape: VitShape,
    *,
    clients: Sequence[int] = (16, 64, 256, 1024, 4096),
    lanes: int = 64,
    images: int = 4,
) -> None:
    """Seconds and memory of a round of ever more clients with one local step each, in the same lanes."""
    workload = Workload(shape, device, dtype)
    executor = workload.sweep(lanes)
    workload.train(executor, workload.round(lanes, images=images, steps=1))
    seconds_per_client = 0.0
    for count in clients:
        if seconds_per_client * count * 1.2 > findings.seconds_left:
            findings.row("clients", {"clients": count, "error": TIME_UP})
            continue
        round = workload.round(count, images=images, steps=1)
        cost = round_cost(workload, executor, round, repeats=1)
        seconds_per_client = cost.seconds / count
        findings.row(
            "clients",
            {
                "clients": count,
                "lanes": lanes,
                "images": images,
                "seconds": cost.seconds,
                "clients_per_second": count / cost.seconds,
                "peak_gigabytes": cost.peak_gigabytes,
            },
        )
        name = f"round of {count} clients × {images} images"
        findings.figure(Figure(name, count / cost.seconds, "clients/s"))
        findings.figure(Figure(f"{name}: peak memory", cost.peak_gigabytes, "GB"))

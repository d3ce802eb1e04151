"""The kernel benchmarks as a stage of the GPU report, beside their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from fedra_engine.benchmarks.gpu.findings import Figure, Findings, StageFailed, at_least, at_most
from fedra_engine.benchmarks.kernels.cases import ENGINE, Sizes
from fedra_engine.benchmarks.kernels.lora import BACKWARD, FORWARD, GIVEN, KERNEL
from fedra_engine.benchmarks.kernels.measure import (
    KernelMeasurement,
    kernel_cases,
    measure_kernels,
    measured_peaks,
    versions,
)
from fedra_engine.benchmarks.kernels.report import (
    block_ratios,
    expected_records,
    measured_records,
    plot,
    write_csv,
)
from fedra_engine.benchmarks.kernels.work import Peaks

_BLOCK_TARGETS = {FORWARD: 1.15, GIVEN: 1.08, BACKWARD: 1.5}
_COPY_KERNELS = ("aggregate", "sgd", "adamw")
_COPY_TARGET = 85.0
_SECONDS_FOR_PLOT = 8.0


def kernel_stage(findings: Findings, device: torch.device, sizes: Sizes, *, gemm_size: int, seconds: float) -> None:
    """Measure as many providers as the time allows; `kernels.csv` grows with each, `kernels.png` comes last.

    Raises:
        StageFailed: an op of the engine failed; failing baselines only show in the table.
    """
    cases = kernel_cases(sizes)
    peaks = measured_peaks(device, sizes.dtype, size=gemm_size)
    expected = expected_records(cases, peaks, versions())
    findings.figure(Figure("measured GEMM rate", peaks.flops / 1e12, "TFLOP/s"))
    findings.figure(Figure("measured copy rate", peaks.bandwidth / 1e12, "TB/s"))
    measurements: list[KernelMeasurement] = []
    for found in measure_kernels(cases, device, seconds=seconds, proceed=lambda: _time_left(findings)):
        measurements.append(found)
        findings.row("kernels", _row(found, peaks))
        write_csv(findings.folder / "kernels.csv", [*expected, *measured_records(measurements, peaks, versions())])
    for figure in target_figures(measurements):
        findings.figure(figure)
    plot(findings.folder / "kernels.png", measurements, peaks)
    broken = [f"{m.case.kernel} {m.case.mode}: {m.error}" for m in measurements if m.provider == ENGINE and m.error]
    if broken:
        raise StageFailed("; ".join(broken))


def _time_left(findings: Findings) -> bool:
    return findings.seconds_left > _SECONDS_FOR_PLOT


def target_figures(measurements: Sequence[KernelMeasurement]) -> list[Figure]:
    """The figures that have targets."""
    figures = []
    for mode, limit in _BLOCK_TARGETS.items():
        ratios = block_ratios(measurements, KERNEL, mode)
        for provider in sorted(ratios):
            name = f"block, {mode}, {provider}: over frozen products"
            if provider == ENGINE:
                figures.append(at_most(name, ratios[provider], limit, "×"))
            elif provider != "frozen":
                figures.append(Figure(name, ratios[provider], "×"))
    seconds = {(m.case.kernel, m.provider): m.times.p50 for m in measurements if m.times is not None}
    for kernel in _COPY_KERNELS:
        own, copy = seconds.get((kernel, ENGINE)), seconds.get((kernel, "copy"))
        if own and copy:
            figures.append(at_least(f"{kernel}: share of copy bandwidth", 100 * copy / own, _COPY_TARGET, "%"))
    return figures


def _row(found: KernelMeasurement, peaks: Peaks) -> dict[str, object]:
    case = found.case
    row: dict[str, object] = {"kernel": case.kernel, "mode": case.mode, "x": case.x, "provider": found.provider}
    if found.times is None:
        return row | {"error": found.error}
    return row | asdict(found.times) | {"over_expected": found.times.p50 / case.work.seconds(peaks)}

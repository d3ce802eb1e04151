"""The kernel benchmarks as two stages: the engine's ops with tiles to compare, and later every other baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.gpu.findings import Figure, Findings, StageFailed, at_least, at_most, beside_expected, read_stage
from benchmarks.gpu.library import library_peaks
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.gpu.tiles import measure_tiles
from benchmarks.kernels.blocks import KERNEL as WHOLE_BLOCK
from benchmarks.kernels.cases import ENGINE, Case
from benchmarks.kernels.lora import BACKWARD, FORWARD, KERNEL, PRODUCT
from benchmarks.kernels.measure import (
    TIME_UP,
    KernelMeasurement,
    kernel_cases,
    measure_kernels,
    versions,
)
from benchmarks.kernels.report import block_ratios, expected_records, key, measured_records, write_csv
from benchmarks.kernels.timing import Times
from benchmarks.kernels.work import Peaks

ENGINE_STAGE = "kernels"
_TABLE = "kernels"
_BLOCK_TARGETS = {(KERNEL, FORWARD): 1.15, (PRODUCT, FORWARD): 1.08, (KERNEL, BACKWARD): 1.9}
_COPY_KERNELS = ("aggregate", "sgd", "adamw")
_COPY_TARGET = 85.0
_SECONDS_FOR_ONE = 2.0
"""What a provider takes, inputs and compiling included: a guess; nothing has been measured."""


def engine_kernels(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Time the engine's ops and what each is held against, then other tiles; the CSV grows with each.

    Raises:
        StageFailed: an op of the engine failed; a failing baseline or tile only shows in the table.
    """
    cases = kernel_cases(sizes.block(device), sizes.second_block(device))
    peaks = library_peaks(findings.folder, sizes, device)
    decisive = [_only(case, {case.denominator, ENGINE} & set(case.providers)) for case in cases]
    found = _measure(findings, sizes, device, decisive, peaks, [])
    for figure in target_figures(found, peaks):
        findings.figure(figure)
    _keep(findings, measure_tiles(findings, sizes, device), found, peaks, "tiles")
    for figure in tile_figures(found):
        findings.figure(figure)
    _fail_for_the_engine(found)


def other_baselines(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Time every provider that `engine_kernels` left out, as long as there is time."""
    cases = kernel_cases(sizes.block(device), sizes.second_block(device))
    peaks = library_peaks(findings.folder, sizes, device)
    earlier = earlier_measurements(findings.folder, cases)
    timed = {(key(found.case), found.provider) for found in earlier if found.times is not None}
    others = [_only(case, {name for name in case.providers if (key(case), name) not in timed}) for case in cases]
    found = _measure(findings, sizes, device, others, peaks, earlier)
    for kernel, mode in _BLOCK_TARGETS:
        for provider, ratio in sorted(block_ratios([*earlier, *found], kernel, mode).items()):
            if provider not in ("frozen", ENGINE):
                findings.figure(Figure(f"{kernel} {mode}, {provider}: over frozen products", ratio, "×"))


def earlier_measurements(folder: Path, cases: Sequence[Case]) -> list[KernelMeasurement]:
    """What `engine_kernels` has measured of these cases."""
    by_key = {key(case): case for case in cases}
    rows = read_stage(folder, ENGINE_STAGE)["tables"].get(_TABLE, ())
    return [
        KernelMeasurement(by_key[name], row["provider"], Times(row["p20"], row["p50"], row["p80"]))
        for row in rows
        if "p50" in row and (name := (row["kernel"], row["mode"], row["x"])) in by_key
    ]


def target_figures(measurements: Sequence[KernelMeasurement], peaks: Peaks) -> list[Figure]:
    """The figures that have targets, beside what the counted work makes of them at these peaks."""
    figures = []
    for (kernel, mode), limit in _BLOCK_TARGETS.items():
        ratio = block_ratios(measurements, kernel, mode).get(ENGINE)
        if ratio is not None:
            expected = _expected_ratio(measurements, kernel, mode, peaks)
            figures.append(at_most(f"{kernel} {mode}: over frozen products", ratio, limit, "×", expected=expected))
    figures += block_figures(measurements, peaks)
    seconds = {(found.case.kernel, found.provider): found.times.p50 for found in measurements if found.times}
    for kernel in _COPY_KERNELS:
        own, copy = seconds.get((kernel, ENGINE)), seconds.get((kernel, "copy"))
        if own and copy:
            name = f"{kernel}: share of copy bandwidth"
            figures.append(at_least(name, 100 * copy / own, _COPY_TARGET, "%", expected=100.0))
    return figures


def block_figures(measurements: Sequence[KernelMeasurement], peaks: Peaks) -> list[Figure]:
    """The time of whole blocks over that of their frozen products and their attention."""
    whole = [found for found in measurements if found.case.kernel == WHOLE_BLOCK and found.times]
    frozen = {key(found.case): found.times.p50 for found in whole if found.times and found.provider == "frozen"}
    figures = []
    for found in whole:
        case, alone = found.case, frozen.get(key(found.case))
        if found.times and alone and found.provider == ENGINE:
            name = f"block of a {case.x}, {case.mode}: over frozen products and attention"
            figures.append(Figure(name, found.times.p50 / alone, "×", expected=case.work.seconds(peaks) / alone))
    return figures


def tile_figures(measurements: Sequence[KernelMeasurement]) -> list[Figure]:
    """The best tile of each layer, as a multiple of the frozen product's time."""
    figures = []
    layers = dict.fromkeys(found.case.x for found in measurements if found.provider.startswith(f"{ENGINE} "))
    for layer in layers:
        times = {
            found.provider: found.times.p50
            for found in measurements
            if found.case.x == layer and found.case.kernel == PRODUCT and found.times
        }
        tiles = {name: seconds for name, seconds in times.items() if name.startswith(f"{ENGINE} ")}
        if tiles and "frozen" in times:
            best = min(tiles, key=lambda name: tiles[name])
            name = f"best tile of {layer}: {best.removeprefix(f'{ENGINE} ')}"
            figures.append(Figure(name, tiles[best] / times["frozen"], "×"))
    return figures


def _expected_ratio(measurements: Sequence[KernelMeasurement], kernel: str, mode: str, peaks: Peaks) -> float | None:
    """Roofline of the engine's work over the frozen products' measured times."""
    frozen = {
        found.case.x: (found.case.work.seconds(peaks), found.times.p50)
        for found in measurements
        if found.case.kernel == kernel and found.case.mode == mode and found.provider == "frozen" and found.times
    }
    total = sum(measured for _, measured in frozen.values())
    return sum(expected for expected, _ in frozen.values()) / total if total else None


def _only(case: Case, providers: set[str]) -> Case:
    return replace(case, providers={name: make for name, make in case.providers.items() if name in providers})


def _measure(
    findings: Findings,
    sizes: ReportSizes,
    device: torch.device,
    cases: Sequence[Case],
    peaks: Peaks,
    earlier: Sequence[KernelMeasurement],
) -> list[KernelMeasurement]:
    found: list[KernelMeasurement] = []
    measured = measure_kernels(
        cases, device, seconds=sizes.seconds, proceed=lambda: findings.seconds_left > _SECONDS_FOR_ONE
    )
    _keep(findings, measured, found, peaks, _TABLE, earlier)
    late = sum(each.error == TIME_UP for each in found)
    if late:
        findings.leave_out(f"{late} of {len(found)} kernel timings")
    return found


def _keep(
    findings: Findings,
    measured: Iterable[KernelMeasurement],
    found: list[KernelMeasurement],
    peaks: Peaks,
    table: str,
    earlier: Sequence[KernelMeasurement] = (),
) -> None:
    """Add what is `measured` to `found`, to a table of the findings and to the CSV, one by one."""
    known = versions()
    for each in measured:
        found.append(each)
        findings.row(table, _row(each, peaks))
        # What the other stage has written is not written twice.
        expected = (
            [] if earlier else expected_records(list({key(m.case): m.case for m in found}.values()), peaks, known)
        )
        write_csv(findings.csv, [*expected, *measured_records(found, peaks, known, earlier=earlier)])


def _row(found: KernelMeasurement, peaks: Peaks) -> dict[str, object]:
    case = found.case
    row: dict[str, object] = {"kernel": case.kernel, "mode": case.mode, "x": case.x, "provider": found.provider}
    if found.times is None:
        return row | {"error": found.error}
    beside = beside_expected(found.times.p50, case.work.seconds(peaks), judged=found.provider == ENGINE)
    return row | asdict(found.times) | beside


def _fail_for_the_engine(found: Sequence[KernelMeasurement]) -> None:
    broken = [
        f"{each.case.kernel} {each.case.mode}: {each.error}"
        for each in found
        if each.provider == ENGINE and each.error not in ("", TIME_UP)
    ]
    if broken:
        raise StageFailed("; ".join(broken))

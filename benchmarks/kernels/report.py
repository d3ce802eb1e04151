"""Kernel measurements as rows of one schema, as a table and as a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.kernels.cases import ENGINE, Case
from benchmarks.kernels.measure import KernelMeasurement
from benchmarks.kernels.timing import Times
from benchmarks.kernels.work import Peaks
from fedra_engine.runtime.files import write_whole

EXPECTED = "expected"


@dataclass(frozen=True)
class Record:
    """One figure of one provider: the schema of every kernel CSV.

    metric: seconds, tflops, gigabytes_per_second, over_denominator (multiples of the frozen product's time, or of
    a copy's that moves as many bytes) or over_expected (multiples of the roofline at `device`'s peaks).
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    x: str
    p20: float
    p50: float
    p80: float
    device: str
    versions: str


def expected_records(cases: Sequence[Case], peaks: Peaks, versions: str) -> list[Record]:
    """What each case should take at `peaks` by its counted work."""
    records = []
    for case in cases:
        seconds = case.work.seconds(peaks)
        figures = (case.kernel, EXPECTED, case.mode, "seconds", case.x, seconds, seconds, seconds)
        records.append(Record(*figures, peaks.name, versions))
    return records


def measured_records(
    measurements: Sequence[KernelMeasurement],
    peaks: Peaks,
    versions: str,
    *,
    earlier: Sequence[KernelMeasurement] = (),
) -> list[Record]:
    """All metrics of all measurements that have times; `earlier` ones may hold their denominators."""
    denominators = denominator_seconds([*earlier, *measurements])
    records = []
    for found in measurements:
        case, times = found.case, found.times
        if times is not None:
            for metric, values in _metrics(case, times, peaks, denominators.get(key(case))):
                name = (case.kernel, found.provider, case.mode, metric, case.x)
                records.append(Record(*name, *values, peaks.name, versions))
    return records


def denominator_seconds(measurements: Sequence[KernelMeasurement]) -> dict[tuple[str, str, str], float]:
    """The median of each case's denominator."""
    return {
        key(found.case): found.times.p50
        for found in measurements
        if found.times is not None and found.provider == found.case.denominator
    }


def key(case: Case) -> tuple[str, str, str]:
    """What distinguishes cases."""
    return case.kernel, case.mode, case.x


def _metrics(
    case: Case, times: Times, peaks: Peaks, denominator: float | None
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    seconds = (times.p20, times.p50, times.p80)
    slow_first = tuple(reversed(seconds))
    yield "seconds", seconds
    if case.work.flops:
        yield "tflops", _each(case.work.flops / 1e12, slow_first)
    yield "gigabytes_per_second", _each(case.work.bytes / 1e9, slow_first)
    expected = case.work.seconds(peaks)
    if denominator is not None:
        yield "over_denominator", (times.p20 / denominator, times.p50 / denominator, times.p80 / denominator)
    yield "over_expected", (times.p20 / expected, times.p50 / expected, times.p80 / expected)


def _each(amount: float, seconds: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = (amount / value for value in seconds)
    return first, second, third


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write `records`, one per line; readers see the old or the new file, never part of it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(Record.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in records)
    write_whole(path, text.getvalue())


def kernel_table(measurements: Sequence[KernelMeasurement], peaks: Peaks) -> Table:
    """Times, rates and ratios, a line for each provider of each case."""
    table = Table(title=f"Kernels on {peaks.name}: {_peaks(peaks)}", title_justify="left")
    for column in ("kernel", "mode", "x", "provider"):
        table.add_column(column)
    for column in ("p20 ms", "p50 ms", "p80 ms", "TFLOP/s", "GB/s", "× frozen/copy", "× expected"):
        table.add_column(column, justify="right")
    denominators = denominator_seconds(measurements)
    order = {case: number for number, case in enumerate(dict.fromkeys(key(found.case) for found in measurements))}
    for found in sorted(measurements, key=lambda found: order[key(found.case)]):
        name = (*key(found.case), found.provider)
        if found.times is None:
            table.add_row(*name, found.error)
            continue
        values = dict(_metrics(found.case, found.times, peaks, denominators.get(key(found.case))))
        cells = [f"{1000 * value:.3f}" for value in values["seconds"]]
        cells += [
            f"{values[metric][1]:.3g}" if metric in values else ""
            for metric in ("tflops", "gigabytes_per_second", "over_denominator", "over_expected")
        ]
        table.add_row(*name, *cells, style="bold" if found.provider == ENGINE else None)
    return table


def expected_table(cases: Sequence[Case], devices: Sequence[Peaks]) -> Table:
    """What to expect of devices, before anything is measured there."""
    title = "\n".join(f"Expected at {_peaks(peaks)} ({peaks.name})" for peaks in devices)
    table = Table(title=title, title_justify="left")
    for column in ("kernel", "mode", "x"):
        table.add_column(column)
    for column in ("TFLOP", "GB", *(f"ms, {peaks.name.partition(',')[0]}" for peaks in devices)):
        table.add_column(column, justify="right")
    for case in cases:
        work = case.work
        milliseconds = [f"{1000 * work.seconds(peaks):.3f}" for peaks in devices]
        table.add_row(*key(case), f"{work.flops / 1e12:.3f}", f"{work.bytes / 1e9:.3f}", *milliseconds)
    return table


def _peaks(peaks: Peaks) -> str:
    return f"{peaks.flops / 1e12:.4g} TFLOP/s and {peaks.bandwidth / 1e12:.3g} TB/s"


def block_ratios(measurements: Sequence[KernelMeasurement], kernel: str, mode: str) -> Mapping[str, float]:
    """Time over all layers of a block, as a multiple of the frozen products', for each provider.

    Providers that lack a layer are left out.
    """
    times = {
        (found.case.mode, found.provider, found.case.x): found.times.p50
        for found in measurements
        if found.case.kernel == kernel and found.times is not None
    }
    layers = {found.case.x for found in measurements if found.case.kernel == kernel}
    frozen = [times.get((mode, "frozen", x)) for x in layers]
    ratios = {}
    for provider in {name for other, name, _ in times if other == mode}:
        own = [times.get((mode, provider, x)) for x in layers]
        if layers and None not in own and None not in frozen:
            ratios[provider] = sum(filter(None, own)) / sum(filter(None, frozen))
    return ratios


def plot(path: Path, measurements: Sequence[KernelMeasurement], peaks: Peaks) -> None:
    """Bars of every provider's median as a multiple of the expected time, a panel for each kernel and mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[KernelMeasurement]] = {}
    for found in measurements:
        if found.times is not None:
            panels.setdefault((found.case.kernel, found.case.mode), []).append(found)
    columns = 2
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(14, 3.2 * lines), squeeze=False, layout="constrained")
    for axis, (name, members) in zip(axes.flat, panels.items(), strict=False):
        labels = [f"{found.provider} {found.case.x}" for found in members]
        ratios = [found.times.p50 / found.case.work.seconds(peaks) for found in members if found.times is not None]
        colours = ["tab:orange" if found.provider == ENGINE else "tab:gray" for found in members]
        axis.barh(labels, ratios, color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{name[0]}, {name[1]}", fontsize=9)
        axis.tick_params(labelsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"Time over the roofline of {_peaks(peaks)}, {peaks.name}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

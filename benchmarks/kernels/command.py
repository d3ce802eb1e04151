"""`microbench.py kernels`: expectations first, then measurements; without a GPU the CPU paths and resources."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.kernels.cases import cpu_sizes, llama_7b, vit_base
from benchmarks.kernels.measure import kernel_cases, measure_kernels, measured_peaks, versions
from benchmarks.kernels.report import (
    expected_records,
    expected_table,
    kernel_table,
    measured_records,
    plot,
    write_csv,
)
from benchmarks.kernels.resources import resource_table
from benchmarks.kernels.work import CARDS
from fedra_engine.runtime.tables import PlainConsole

GEMM_SIZE = 8192
_CPU_GEMM_SIZE = 768


def run_kernels(output_dir: Path | None, *, seconds: float, architecture: str | None) -> None:
    """Print the tables of this machine and leave `kernels.csv` and `kernels.png` in the folder `output_dir`.

    `seconds` are spent on each provider. Without a GPU the kernels' resources are compiled for `architecture`.
    """
    console = PlainConsole(width=180)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    sizes = vit_base(device) if gpu else cpu_sizes()
    full = kernel_cases(vit_base(torch.device("cuda")), llama_7b(torch.device("cuda")))
    cases = kernel_cases(sizes, llama_7b(device) if gpu else sizes)
    if not gpu:
        torch.set_num_threads(1)
        console.print(
            "No GPU: CPU-seconds of the torch paths at small sizes on one thread, and what to expect of a GPU."
        )
    assumed = [card.peaks for card in CARDS.values()]
    console.print(expected_table(full, assumed))
    peaks = measured_peaks(device, sizes.dtype, size=GEMM_SIZE if gpu else _CPU_GEMM_SIZE)
    records = [
        *(record for each in assumed for record in expected_records(full, each, versions())),
        *expected_records(cases, peaks, versions()),
    ]
    console.print(expected_table(cases, [peaks]))
    measurements = list(measure_kernels(cases, device, seconds=seconds))
    console.print(kernel_table(measurements, peaks))
    if output_dir:
        write_csv(output_dir / "kernels.csv", [*records, *measured_records(measurements, peaks, versions())])
        plot(output_dir / "kernels.png", measurements, peaks)
    if not gpu and architecture is not None:
        console.print(resource_table(architecture))

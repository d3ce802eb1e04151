"""What torch's matrix products (cuBLAS) and a copy reach on this device: the rates that all else is held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.gpu.findings import Figure, Findings, read_stage
from benchmarks.gpu.shapes import VitShape
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.kernels.measure import measured_peaks
from benchmarks.kernels.timing import time_calls
from benchmarks.kernels.work import Peaks

STAGE = "compile"
"""The stage that measures them, while other processes compile."""
_PEAKS, _PRODUCTS = "peaks", "library products"


def measure_library(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Time the large product, the large copy, and every product of the training, forward and dX."""
    peaks = measured_peaks(device, sizes.dtype, size=sizes.peak, seconds=2 * sizes.seconds)
    findings.figure(Figure(f"matrix product of torch, size {sizes.peak}", peaks.flops / 1e12, "TFLOP/s"))
    findings.figure(Figure("copy", peaks.bandwidth / 1e12, "TB/s"))
    findings.row(_PEAKS, {"name": peaks.name, "flops": peaks.flops, "bandwidth": peaks.bandwidth})
    for rows, inputs, outputs in sizes.products:
        forward, backward = _product_seconds(device, sizes, rows, inputs, outputs)
        work = 2.0 * rows * inputs * outputs / 1e12
        row = {"rows": rows, "inputs": inputs, "outputs": outputs, "forward": forward, "backward": backward}
        findings.row(_PRODUCTS, row | {"forward tflops": work / forward, "backward tflops": work / backward})


def library_peaks(folder: Path, sizes: ReportSizes, device: torch.device) -> Peaks:
    """The peaks that were measured earlier in this report, or are measured now."""
    rows = read_stage(folder, STAGE)["tables"].get(_PEAKS)
    if rows:
        return Peaks(rows[0]["name"], rows[0]["flops"], rows[0]["bandwidth"])
    return measured_peaks(device, sizes.dtype, size=sizes.peak, seconds=2 * sizes.seconds)


def product_rate(folder: Path, sizes: ReportSizes, device: torch.device, shape: VitShape, rows: int) -> float:
    """FLOP/s of torch's matrix products over the forward products and the dX of a block of `shape`, at so many rows.

    Measured earlier in this report for these rows, or measured now.
    """
    known = {
        (row["rows"], row["inputs"], row["outputs"]): (row["forward"], row["backward"])
        for row in read_stage(folder, STAGE)["tables"].get(_PRODUCTS, ())
    }
    return _rate(known, sizes, device, shape, rows)


def _rate(
    known: Mapping[tuple[int, int, int], tuple[float, float]],
    sizes: ReportSizes,
    device: torch.device,
    shape: VitShape,
    rows: int,
) -> float:
    flops = seconds = 0.0
    for inputs, outputs in shape.layers:
        found = known.get((rows, inputs, outputs)) or _product_seconds(device, sizes, rows, inputs, outputs)
        flops += 4.0 * rows * inputs * outputs
        seconds += sum(found)
    return flops / seconds


def _product_seconds(
    device: torch.device, sizes: ReportSizes, rows: int, inputs: int, outputs: int
) -> tuple[float, float]:
    """Seconds of x Wᵀ, x [rows, inputs], and of dy W, dy [rows, outputs]."""
    generator = torch.Generator(device).manual_seed(0)
    x, dy, weight = (
        torch.randn(shape, generator=generator, device=device, dtype=sizes.dtype)
        for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
    )
    forward = time_calls([lambda: torch.nn.functional.linear(x, weight)], device, seconds=sizes.seconds)
    backward = time_calls([lambda: dy @ weight], device, seconds=sizes.seconds)
    return forward.p50, backward.p50

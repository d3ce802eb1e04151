"""Other tiles of the product with the expand, on the layers of a ViT and of a LLaMA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.gpu.smoke import PRECISION
from benchmarks.kernels.cases import ENGINE, Case, Sizes
from benchmarks.kernels.lora import GIVEN, lora_cases
from benchmarks.kernels.measure import KernelMeasurement, measure_kernels, name_and_message
from fedra_kernels._kernels.configs import Tile, shape_class
from fedra_kernels._kernels.lora_gemm import CONFIGS
from fedra_kernels.dispatch import architecture

_SECONDS_FOR_ONE = 1.5
"""What a tile in one layer takes, inputs and compiling included: a guess; nothing has been measured."""


def tile_cases(sizes: ReportSizes, block: Sizes, second: Sizes) -> list[Case]:
    """The forward product with S given, in each layer in which tiles are tried."""
    cases = [*lora_cases(block), *lora_cases(second, sizes.second_layers)]
    return [case for case in cases if case.mode == GIVEN]


@contextmanager
def using_tile(tile: Tile, architecture: str, dtype: torch.dtype, rank: int) -> Iterator[None]:
    """Let `lora_gemm` take this tile for a dtype and rank on an architecture, in this process, while the context lasts.

    So it does for every dtype and rank of the same shape class.
    """
    table = cast(dict[str, Any], CONFIGS[architecture])
    key = shape_class(dtype, rank)
    previous, table[key] = table[key], tile
    try:
        yield
    finally:
        table[key] = previous


def tile_name(tile: Tile) -> str:
    """How tables call a tile."""
    return f"{tile.rows}×{tile.columns}×{tile.depth}, {tile.warps} warps, {tile.stages} stages"


def measure_tiles(findings: Findings, sizes: ReportSizes, device: torch.device) -> Iterator[KernelMeasurement]:
    """Time every tile in every layer beside the frozen product.

    Each tile's result is compared with that of the configured tile. A tile that cannot be launched, or whose result
    differs, is a row with an error.
    """
    name = architecture(device)
    for case in tile_cases(sizes, sizes.block(device), sizes.second_block(device)):
        if findings.seconds_left < _SECONDS_FOR_ONE * 2:
            findings.leave_out(f"tiles of {case.x}")
            continue
        expected = _output(case, device)
        chosen = CONFIGS[name][shape_class(sizes.dtype, sizes.block(device).rank)]
        yield from _measured(case, ["frozen"], device, sizes.seconds)
        yield from _measured(case, [ENGINE], device, sizes.seconds, f"{ENGINE} {tile_name(chosen)}, chosen")
        for tile in sizes.tiles:
            if tile == chosen:
                continue
            if findings.seconds_left < _SECONDS_FOR_ONE:
                findings.leave_out(f"tile {tile_name(tile)} of {case.x}")
                continue
            provider = f"{ENGINE} {tile_name(tile)}"
            with using_tile(tile, name, sizes.dtype, sizes.block(device).rank):
                try:
                    wrong = _difference(_output(case, device), expected)
                except Exception as error:  # Too much shared memory, for one.
                    yield KernelMeasurement(case, provider, None, name_and_message(error))
                    continue
                if not wrong <= PRECISION[sizes.dtype]:
                    yield KernelMeasurement(case, provider, None, f"the result differs by {wrong:.1e}")
                    continue
                yield from _measured(case, [ENGINE], device, sizes.seconds, provider)


def _output(case: Case, device: torch.device) -> Tensor:
    with torch.no_grad():
        found = case.providers[ENGINE](case.inputs(torch.Generator(device).manual_seed(0)))()
    assert isinstance(found, Tensor)
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    """max|found − expected| / max|expected|; NaN stays NaN."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def _measured(
    case: Case, providers: Sequence[str], device: torch.device, seconds: float, name: str = ""
) -> Iterator[KernelMeasurement]:
    some = replace(case, providers={provider: case.providers[provider] for provider in providers})
    for found in measure_kernels([some], device, seconds=seconds):
        yield replace(found, case=case, provider=name or found.provider)

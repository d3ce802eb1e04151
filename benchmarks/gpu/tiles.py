"""Other forms of the product with the expand, on the layers of a ViT and of a LLaMA."""

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
from benchmarks.kernels.lora import PRODUCT, lora_cases
from benchmarks.kernels.measure import KernelMeasurement, measure_kernels, name_and_message
from fedra_kernels._kernels.configs import shape_class
from fedra_kernels._kernels.product_forms import GEMM_FORMS, Form, choose_form
from fedra_kernels.dispatch import architecture

_SECONDS_FOR_ONE = 1.5
"""What a form in one layer takes, inputs and compiling included: a guess; nothing has been measured."""


def tile_cases(sizes: ReportSizes, block: Sizes, second: Sizes) -> list[Case]:
    """`lora_gemm` in each layer in which forms are tried."""
    cases = [*lora_cases(block), *lora_cases(second, sizes.second_layers)]
    return [case for case in cases if case.kernel == PRODUCT]


@contextmanager
def using_form(form: Form, architecture: str, dtype: torch.dtype, rank: int) -> Iterator[None]:
    """Let `lora_gemm` take this form for a dtype and rank on an architecture, in this process, while the context lasts.

    So it does for every dtype and rank of the same shape class.
    """
    table = cast(dict[str, Any], GEMM_FORMS[architecture])
    key = shape_class(dtype, rank)
    previous, table[key] = table[key], [form]
    try:
        yield
    finally:
        table[key] = previous


def form_name(form: Form) -> str:
    """How tables call a form."""
    tile, persistent = form.tile, ", persistent" if form.persistent else ""
    return f"{tile.rows}×{tile.columns}×{tile.depth}, {tile.warps} warps, {tile.stages} stages{persistent}"


def measure_tiles(findings: Findings, sizes: ReportSizes, device: torch.device) -> Iterator[KernelMeasurement]:
    """Time every form in every layer beside the frozen product.

    Each form's result is compared with that of the form the table has for the layer. A form that cannot be launched, or
    whose result differs, is a row with an error.
    """
    name, rank = architecture(device), sizes.block(device).rank
    for case in tile_cases(sizes, sizes.block(device), sizes.second_block(device)):
        if findings.seconds_left < _SECONDS_FOR_ONE * 2:
            findings.leave_out(f"forms of {case.x}")
            continue
        expected = _output(case, device)
        chosen = _chosen(case, rank, device)
        yield from _measured(case, ["frozen"], device, sizes.seconds)
        yield from _measured(case, [ENGINE], device, sizes.seconds, f"{ENGINE} {form_name(chosen)}, chosen")
        for form in sizes.forms:
            if form == chosen:
                continue
            if findings.seconds_left < _SECONDS_FOR_ONE:
                findings.leave_out(f"form {form_name(form)} of {case.x}")
                continue
            provider = f"{ENGINE} {form_name(form)}"
            with using_form(form, name, sizes.dtype, rank):
                try:
                    wrong = _difference(_output(case, device), expected)
                except Exception as error:  # Too much shared memory, for one.
                    yield KernelMeasurement(case, provider, None, name_and_message(error))
                    continue
                if not wrong <= PRECISION[sizes.dtype]:
                    yield KernelMeasurement(case, provider, None, f"the result differs by {wrong:.1e}")
                    continue
                yield from _measured(case, [ENGINE], device, sizes.seconds, provider)


def _chosen(case: Case, rank: int, device: torch.device) -> Form:
    inputs = case.inputs(torch.Generator(device).manual_seed(0))
    return choose_form(GEMM_FORMS, rank, [inputs.x], inputs.weight, [len(inputs.weight)])


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

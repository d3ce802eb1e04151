"""Run the kernel benchmarks: every provider of every case, and what to expect by the counted work."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import triton
from torch import Tensor

from benchmarks.kernels.blocks import block_cases
from benchmarks.kernels.cases import COMPILED, Case, Sizes
from benchmarks.kernels.lora import lora_cases
from benchmarks.kernels.low_rank import low_rank_cases
from benchmarks.kernels.rows import row_cases
from benchmarks.kernels.slots import slot_cases
from benchmarks.kernels.timing import Times, copies, time_calls
from benchmarks.kernels.work import Peaks

TIME_UP = "the time was up"


@dataclass(frozen=True)
class KernelMeasurement:
    """The times of one provider in one case; `error` is one line on why there are none."""

    case: Case
    provider: str
    times: Times | None
    error: str = ""


def kernel_cases(sizes: Sizes, llama: Sizes) -> list[Case]:
    """Every op of `fedra_kernels` at these sizes of a ViT, and a block of a LLaMA at its own; nothing is allocated."""
    cases = lora_cases(sizes), row_cases(sizes), block_cases(sizes, llama), low_rank_cases(sizes), slot_cases(sizes)
    return list(chain(*cases))


def measure_kernels(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float,
    proceed: Callable[[], bool] = lambda: True,
) -> Iterator[KernelMeasurement]:
    """Time every provider for about `seconds`; those that take long to compile come last, on a GPU only.

    A provider that fails is a measurement with an error. Ends early, with an error for each provider not reached,
    once `proceed` returns False.
    """
    rounds = (False, True) if device.type == "cuda" else (False,)
    for compiled in rounds:
        for case in cases:
            names = [name for name in case.providers if name.startswith(COMPILED) == compiled]
            yield from _measure_case(case, names, device, seconds, proceed)


def _measure_case(
    case: Case, names: Sequence[str], device: torch.device, seconds: float, proceed: Callable[[], bool]
) -> Iterator[KernelMeasurement]:
    if not names:
        return
    inputs: list[object] = []
    for name in names:
        if not proceed():
            yield KernelMeasurement(case, name, None, TIME_UP)
            continue
        try:
            with torch.no_grad():
                if not inputs:
                    generator = torch.Generator(device).manual_seed(0)
                    inputs = [case.inputs(generator)]
                    more = copies(_bytes(inputs[0]), device) - 1
                    inputs += [case.inputs(generator) for _ in range(more)]
                times = time_calls([case.providers[name](each) for each in inputs], device, seconds=seconds)
            yield KernelMeasurement(case, name, times)
        # Whatever a baseline raises on some GPU is reported; the other providers still count.
        except Exception as error:
            yield KernelMeasurement(case, name, None, name_and_message(error))


def measured_peaks(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = 0.3) -> Peaks:
    """The best rate of a square product of `size` and of one shaped like a batch, and the rate of a large copy."""
    rates = []
    for rows, inner in ((size, size), (8 * size, size // 8)):
        left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (size, inner)))

        def product(left: Tensor = left, right: Tensor = right) -> Tensor:
            return torch.nn.functional.linear(left, right)

        rates.append(2.0 * rows * inner * size / time_calls([product], device, seconds=seconds).p50)
    source = torch.randint(0, 256, (max(16 * size * size, 1 << 26),), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copying = time_calls([lambda: target.copy_(source)], device, seconds=seconds).p50
    return Peaks(device_name(device), max(rates), 2 * len(source) / copying)


def device_name(device: torch.device) -> str:
    """What to write beside a figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def versions() -> str:
    """The versions that decide about speed."""
    toolkit = torch.version.cuda or torch.version.hip or "CPU"
    return f"torch {torch.__version__}, {toolkit}, triton {triton.__version__}, Python {platform.python_version()}"


def name_and_message(error: BaseException) -> str:
    """An exception as one line: its type, and the start of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _bytes(inputs: object) -> int:
    return sum(value.nbytes for value in vars(inputs).values() if isinstance(value, Tensor))

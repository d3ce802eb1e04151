"""The kernel benchmarks on the CPU: counted work, timing, the CSV's schema and every provider's answer."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernels.cases import COMPILED, ENGINE, Case, Sizes, cpu_sizes, llama_7b, vit_base
from benchmarks.kernels.lora import BACKWARD, FORWARD, PRODUCT
from benchmarks.kernels.measure import KernelMeasurement, kernel_cases, measure_kernels
from benchmarks.kernels.report import (
    Record,
    block_ratios,
    expected_records,
    measured_records,
    plot,
    write_csv,
)
from benchmarks.kernels.timing import Times, time_calls
from benchmarks.kernels.work import H100, Peaks, lora_backward, lora_forward

CPU = torch.device("cpu")
LAYERS = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
TINY = replace(cpu_sizes(), clients=3, samples=2, tokens=5, width=32, hidden=64, rank=4, slots=6, blocks=3)


def cases(kernel: str, sizes: Sizes = TINY) -> list[Case]:
    return [case for case in kernel_cases(sizes, sizes) if case.kernel == kernel]


def run(case: Case, provider: str) -> object:
    with torch.no_grad():
        return case.providers[provider](case.inputs(torch.Generator().manual_seed(0)))()


def test_the_counted_work_of_a_vit_block_gives_the_published_rooflines() -> None:
    rows, layers = 64 * 16 * 197, LAYERS
    frozen = sum(lora_forward(rows, *layer, 0, 0, 2, given=True).seconds(H100) for layer in layers)
    forward = sum(lora_forward(rows, *layer, 16, 64, 2, given=False).seconds(H100) for layer in layers)
    given = sum(lora_forward(rows, *layer, 16, 64, 2, given=True).seconds(H100) for layer in layers)
    backward = sum(lora_backward(rows, *layer, 16, 64, 2).seconds(H100) for layer in layers)
    assert frozen == pytest.approx(3.57e-3, rel=0.01)
    assert 1.01 < given / frozen < forward / frozen < 1.04
    assert backward / frozen == pytest.approx(1.5, abs=0.05)


def test_percentiles_are_of_the_calls_that_were_timed() -> None:
    calls = [0, 0]

    def call(which: int) -> None:
        calls[which] += 1
        torch.randn(20_000).sort()

    times = time_calls([lambda: call(0), lambda: call(1)], CPU, seconds=0.02)
    assert 0.0 < times.p20 <= times.p50 <= times.p80
    assert min(calls) >= 3


def test_every_way_to_apply_adapters_gives_the_engines_product() -> None:
    for case in cases("lora_linear"):
        if case.mode == BACKWARD:
            continue
        expected = run(case, ENGINE)
        for provider in case.providers:
            if provider == "frozen" or provider.startswith(COMPILED):
                continue
            found = run(case, provider)
            joined = torch.cat(found) if isinstance(found, list) else found
            assert isinstance(joined, Tensor)
            torch.testing.assert_close(joined.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_every_way_to_differentiate_adapters_gives_the_engines_gradient_of_the_input() -> None:
    for case in cases("lora_linear"):
        if case.mode != BACKWARD:
            continue
        (expected,) = run(case, ENGINE)
        peft = torch.cat(run(case, "PEFT, client by client")[: TINY.clients])
        bmm = run(case, "torch.bmm")[0].reshape(expected.shape)
        for found in (peft, bmm, run(case, "matmul + addmm_")):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


STEPS = [
    "norm + 3 S", "GELU + S", "SwiGLU + S", "dS + dB of the stream's rows", "GELU + the Linear before it",
    "low_rank_add",
]  # fmt: skip


@pytest.mark.parametrize("kernel", STEPS)
def test_the_eager_rows_are_the_engines(kernel: str) -> None:
    assert cases(kernel)
    for case in cases(kernel):
        torch.manual_seed(0)
        expected = run(case, ENGINE)
        torch.manual_seed(0)
        # S is in the form of its path; sums for gradients of adapters, which come last, the engine keeps to itself.
        for found, want in zip(run(case, "eager"), expected, strict=False):
            if want.shape[-1] != TINY.rank:
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_blocks_backward_is_timed_from_the_gradient_behind_it_to_the_one_before() -> None:
    """In place, in both: no provider has a copy of the stream or of its gradient to make."""
    for case in cases("stream_block"):
        inputs = case.inputs(torch.Generator().manual_seed(0))
        before = {name: getattr(inputs, name).clone() for name in ("stream", "grad", "gradients")}
        with torch.no_grad():
            case.providers[ENGINE](inputs)()
        changed = {name for name, values in before.items() if not torch.equal(getattr(inputs, name), values)}
        assert changed == ({"stream"} if case.mode == "forward" else {"stream", "grad", "gradients"})
        others = [row for row in range(len(inputs.stream)) if row not in inputs.index.tolist()]
        for name in ("stream", "grad"):
            assert torch.equal(getattr(inputs, name)[others], before[name][others])
            assert getattr(inputs, name).isfinite().all()
        frozen = case.providers["frozen"](inputs)
        assert frozen().shape == inputs.x.shape


def test_a_blocks_counted_work_is_that_of_its_products_and_a_little_more() -> None:
    rows = 64 * 16 * 197
    products = 2.0 * rows * 768 * (768 * 4 + 3072 * 2)
    attention = 4.0 * rows * 197 * 768
    (forward, both, *_) = cases("stream_block", vit_base(torch.device("cuda")))
    assert 1.0 < forward.work.flops / (products + attention) < 1.05
    assert 1.0 < both.work.flops / (2 * products + 3.5 * attention) < 1.08
    # As a share of the time of the frozen products, and not of their traffic.
    frozen = sum(lora_forward(rows, *layer, 0, 0, 2, given=True).seconds(H100) for layer in LAYERS)
    assert 1.2 < forward.work.seconds(H100) / frozen < 1.8


def test_the_expected_times_at_full_size_need_no_memory() -> None:
    full = kernel_cases(vit_base(torch.device("cuda")), llama_7b(torch.device("cuda")))
    records = expected_records(full, H100, "")
    assert {record.kernel for record in records} >= {
        "lora_linear",
        "GELU + S",
        "stream_block",
        "aggregate",
        "adamw",
        "sgd",
    }
    assert all(record.p50 > 0 for record in records)


def test_a_failing_baseline_is_reported_and_the_others_still_count() -> None:
    def fail(_: object) -> object:
        raise RuntimeError("no such\nkernel")

    case = cases("norm + 3 S")[0]
    broken = replace(case, providers={"broken": fail, **case.providers})
    measured = list(measure_kernels([broken], CPU, seconds=0.001))
    assert [(m.provider, m.error) for m in measured if m.error] == [("broken", "RuntimeError: no such kernel")]
    assert {m.provider for m in measured if m.times} == {"copy", ENGINE, "eager"}


def test_what_the_time_does_not_suffice_for_is_named() -> None:
    measured = list(measure_kernels(cases("norm + 3 S"), CPU, seconds=0.001, proceed=lambda: False))
    assert {m.error for m in measured} == {"the time was up"}


def test_csv_and_plot_hold_every_metric_of_every_measurement(tmp_path: Path) -> None:
    case = cases("lora_linear")[0]
    measured = [KernelMeasurement(case, name, Times(1e-3, 2e-3, 4e-3)) for name in ("frozen", ENGINE)]
    peaks = Peaks("test", 1e12, 1e11)
    write_csv(tmp_path / "kernels.csv", measured_records(measured, peaks, "v"))
    plot(tmp_path / "kernels.png", measured, peaks)
    rows = list(csv.DictReader((tmp_path / "kernels.csv").open()))
    assert list(rows[0]) == list(Record.__dataclass_fields__)
    engine = {row["metric"]: row for row in rows if row["provider"] == ENGINE}
    assert set(engine) == {"seconds", "tflops", "gigabytes_per_second", "over_denominator", "over_expected"}
    assert float(engine["over_denominator"]["p80"]) == pytest.approx(2.0)
    assert float(engine["tflops"]["p20"]) == pytest.approx(case.work.flops / 1e12 / 4e-3)
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_a_blocks_ratio_adds_its_layers_and_needs_all_of_them() -> None:
    given = cases(PRODUCT)
    measured = [KernelMeasurement(case, "frozen", Times(1.0, 1.0, 1.0)) for case in given]
    measured += [KernelMeasurement(case, ENGINE, Times(1.0, 1.0 + n, 9.0)) for n, case in enumerate(given)]
    assert block_ratios(measured, PRODUCT, FORWARD)[ENGINE] == pytest.approx(2.5)
    assert ENGINE not in block_ratios(measured[:-1], PRODUCT, FORWARD)

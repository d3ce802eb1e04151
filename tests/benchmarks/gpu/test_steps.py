"""What the report says of one training step: its time, its launches and its waits."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.cost.counter import Count
from benchmarks.cost.rules import OpCall
from benchmarks.cost.step import ExpectedStep
from benchmarks.gpu import end_to_end, steps
from benchmarks.gpu.ops import Widths, run_op
from benchmarks.gpu.shapes import VitShape
from benchmarks.gpu.sizes import Point
from benchmarks.gpu.steps import STEPS, StepCost, kind_of, step_cost
from benchmarks.gpu.workload import Workload
from benchmarks.kernels.aot import compile_only
from benchmarks.kernels.work import Peaks
from fedra_engine.execution.sweep import SweepExecutor
from fedra_kernels.dispatch import StandIn, launches_taken_by

CPU = torch.device("cpu")
TINY = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)


def test_a_steps_cost_is_that_of_a_step_without_tables_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload.random(TINY, CPU, torch.float32)
    trained = []
    step = SweepExecutor._step
    monkeypatch.setattr(SweepExecutor, "_step", lambda self, *args: (trained.append(1), step(self, *args)))
    cost = step_cost(workload, lanes=2, samples=1)
    assert len(trained) == STEPS
    assert cost.host > 0
    # Without a GPU, its ops are counted instead of its kernels.
    assert cost.others["mm"] + cost.others["addmm"] > TINY.depth
    assert cost.triton.total() == 0


def test_a_kernels_observed_name_is_that_of_its_compiled_function() -> None:
    with compile_only("sm_90") as compilation:
        run_op("low_rank_add", (2, 1), range(2), CPU, torch.float32, widths=Widths(16, 16, 4, 3))
    assert compilation.kernels
    assert all(name == kernel.metadata.name for name, kernel in compilation.kernels)


def test_profiled_kernels_are_told_apart_by_name() -> None:
    cost = StepCost()
    for name in (
        "lora_gemm_kernel",
        "void at::native::vectorized_elementwise_kernel<4>(int)",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_TNT",
        "Memcpy HtoD (Pinned -> Device)",
        "Memset (Device)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "convert_kernel",
    ):
        kind_of(name, cost, {"lora_gemm_kernel", "sgd_kernel"})[name] += 1
    assert set(cost.triton) == {"lora_gemm_kernel"}
    assert cost.others.total() == 4
    assert cost.copies.total() == 2


def test_launches_and_synchronizations_have_targets_on_a_gpu() -> None:
    point, cost = Point(TINY, 2, 1, 1, 1), StepCost()
    cost.triton["a_kernel"], cost.others["b"] = 286, 120
    cost.synchronizations["sweep.py:1"] = 1
    figures = end_to_end.step_figures(point, cost, None, torch.device("cuda"))
    assert [figure.met for figure in figures if figure.target] == [False, True, False]
    found = end_to_end.step_figures(point, cost, None, CPU)
    assert [figure.name for figure in found] == ["ViT 2 × 1: host time of a step"]


def test_a_measured_step_stands_beside_the_counted_one_op_by_op() -> None:
    point, count = Point(TINY, 2, 1, 1, 1), Count()
    for op, flops, times in (("fedra_kernels::a", 10.0, 3), ("aten::b_", 20.0, 1), ("aten::c", 0.1, 1)):
        count.calls[OpCall(op, "products", flops, 0, 0)] = times
    expected = ExpectedStep(count, Peaks("test", 1e3, 1e3))
    # Autograd adds in place where nobody counts.
    cost = StepCost(gpu=0.1, ops={"fedra_kernels::a": 0.045, "aten::b": 0.01, "aten::b_": 0.008, "aten::c": 1.0})
    cost.triton["a_kernel"] = 3
    first, second = end_to_end.op_rows(point, cost, expected)
    assert (second["op"], second["launches"], second["over_expected"]) == ("fedra_kernels::a", 3, pytest.approx(1.5))
    assert (first["op"], first["over_expected"]) == ("aten::b_", pytest.approx(0.9))
    assert (first["far_off"], second["far_off"]) == ("", "more")
    figures = {figure.name: figure for figure in end_to_end.step_figures(point, cost, expected, torch.device("cuda"))}
    assert figures["ViT 2 × 1: GPU time of a step"].expected == pytest.approx(50.1)
    assert figures["ViT 2 × 1: Triton launches of a step"].expected == 3


def test_kernels_of_a_profiled_step_are_counted_and_the_longest_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> FunctionEvent:
        return FunctionEvent(0, name, 0, 0.0, end, device_type=device, is_user_annotation=annotation)

    class Profile(nullcontext[Any]):
        def __enter__(self) -> Any:
            return self

        def events(self) -> list[FunctionEvent]:
            return [
                event("low_rank_add_kernel", 30.0),
                event("low_rank_add_kernel", 40.0),
                event("nvjet", 50.0),
                event("Memset (Device)", 1.0),
                event("aten::mm", 900.0, DeviceType.CPU),
                event("Optimizer.step", 900.0, annotation=True),
            ]

        def key_averages(self) -> list[SimpleNamespace]:
            return [
                SimpleNamespace(key=key, device_time_total=70.0) for key in ("fedra_kernels::low_rank_add_", "nvjet")
            ]

    monkeypatch.setattr(steps, "profile", lambda **_: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cost, ran = StepCost(), []

    def step() -> None:
        ran.append(1)
        run_op("low_rank_add", (2, 1), range(2), CPU, torch.float32, widths=Widths(16, 16, 4, 3))

    with launches_taken_by(StandIn("sm_90")):
        steps._profile(step, cost)
    assert ran == [1]
    assert (cost.triton, cost.others, cost.copies) == ({"low_rank_add_kernel": 2}, {"nvjet": 1}, {"Memset (Device)": 1})
    assert cost.ops == {"fedra_kernels::low_rank_add_": pytest.approx(70e-6)}
    assert cost.longest[:2] == [("low_rank_add_kernel", 2, pytest.approx(70e-6)), ("nvjet", 1, pytest.approx(50e-6))]


def test_synchronizations_are_counted_by_the_line_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    (place,) = (found := steps._synchronizations(step))
    assert place.partition(":")[0].endswith("test_steps.py")
    assert found[place] == 3
    assert modes == ["warn", 0]

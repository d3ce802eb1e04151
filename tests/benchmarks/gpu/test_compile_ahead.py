"""Kernels that are compiled ahead are those that the later stages launch, each compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.gpu import stages
from benchmarks.gpu.compile_ahead import CompileAhead, PreparedCall, compilations
from benchmarks.gpu.compile_calls import calls_of
from benchmarks.gpu.ops import Widths, run_op
from benchmarks.gpu.shapes import SMALL_VIT
from benchmarks.gpu.sizes import GPU, REHEARSAL, ReportSizes
from benchmarks.gpu.workload import CPU, SGD, Workload
from benchmarks.kernels import aot
from benchmarks.kernels.aot import compile_only
from benchmarks.kernels.cases import Sizes
from fedra_kernels._kernels.configs import Tile
from fedra_kernels._kernels.product_forms import Form
from fedra_kernels.low_rank_add import low_rank_add_kernel


@contextmanager
def variants_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """Collect which variants of which kernels would be compiled, and compile none."""
    met: set[tuple[str, str]] = set()

    def hook(**about: Any) -> bool:
        met.add((about["fn"].name, f"{about['repr']} {about['compile']['constants']}"))
        return True

    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
        yield met


def names(met: set[tuple[str, str]]) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in met}


def test_a_small_round_compiles_what_larger_ones_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = replace(GPU, round_shape=SMALL_VIT)
    with variants_only(monkeypatch) as ahead:
        for call in calls_of(sizes, ("checked round",)):
            run = call.prepare()
            with compile_only("sm_90"):
                run()
    workload = Workload.random(SMALL_VIT, CPU, torch.float32, training=SGD, fuse_blocks=True)
    with variants_only(monkeypatch) as needed:
        for clients, lanes, samples in ((5, 3, 3), (16, 16, 16), (7, 7, 1)):
            round = workload.round(clients, samples=samples, steps=2)
            with compile_only("sm_90"):
                workload.train(workload.sweep(lanes), round)
    assert len(names(needed)) > 12
    assert needed <= ahead


@pytest.mark.parametrize(
    "group", ["step", "embedded step", "kernels", "tiles", "checked ops", "smoke ops", "smoke round"]
)
def test_every_call_can_be_made_and_needs_kernels(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(REHEARSAL, (group,))
    assert calls
    for call in calls:
        run = call.prepare()
        with variants_only(monkeypatch) as met, compile_only("sm_90"):
            run()
        assert met


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 4), (torch.bfloat16, 64)])
def test_every_form_is_compiled_at_the_dtype_and_rank_at_which_it_is_tried(
    dtype: torch.dtype, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def block(device: torch.device) -> Sizes:
        return Sizes(2, 1, 5, 64, 64, rank, 4, 2, 10, dtype, device, dtype)

    forms = tuple(Form(tile, "tried") for tile in (Tile(32, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2)))
    sizes = replace(REHEARSAL, dtype=dtype, block=block, second_layers=(), second_block=block, forms=forms)
    for call in calls_of(sizes, ("tiles",)):
        run = call.prepare()
        with variants_only(monkeypatch) as met, compile_only("sm_90"):
            run()
        assert len([name for name, _ in met if name.endswith("lora_gemm_kernel")]) == len(forms)


def test_every_group_of_calls_that_a_report_names_exists() -> None:
    for sizes in (GPU, REHEARSAL):
        calls_of(sizes, (*sizes.smoke_compiled, *sizes.compiled))


def _calls(failing: bool = False) -> Sequence[PreparedCall]:
    op = partial(run_op, "low_rank_add", (2, 1), range(2), CPU, torch.float32, widths=Widths(16, 16, 4, 3))

    def fail() -> Callable[[], object]:
        raise ValueError("no such op")

    calls = [PreparedCall("add", lambda: op), PreparedCall("add again", lambda: op)]
    return [*calls, PreparedCall("wrong", fail)] if failing else calls


def test_processes_share_the_work_and_a_later_process_finds_what_they_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead = CompileAhead(partial(_calls, failing=True), "sm_90", processes=2, method="fork")
    compiled = ahead.wait(120.0)
    assert compiled.finished
    assert compiled.failures == ("wrong: ValueError: no such op",)
    # Forward and backward of one op, whoever compiled them, and no one twice.
    assert compiled.kernels == len(list(tmp_path.glob("*/*.cubin"))) > 0
    # As in a process of its own, whose memory holds no kernels yet.
    low_rank_add_kernel.device_caches.clear()
    with compilations() as names, compile_only("sm_90"):
        for call in _calls():
            call.prepare()()
    assert names == []


@pytest.mark.parametrize("fails", [False, True])
def test_the_launcher_of_every_kernel_is_built_once_and_one_that_cannot_be_costs_the_others_nothing(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    low_rank_add_kernel.device_caches.clear()
    log = tmp_path / "built"

    def build(kernel: Any) -> None:
        with log.open("a") as file:
            file.write(f"{kernel.hash}\n")
        if fails:
            raise FileNotFoundError("gcc")

    monkeypatch.setattr(aot, "build_launcher", build)
    compiled = CompileAhead(_calls, "sm_90", processes=2, method="fork", launchers=True).wait(120.0)
    built = log.read_text().split()
    assert len(built) == len(set(built)) == compiled.kernels > 0
    assert compiled.finished
    told = ("launcher of low_rank_add_kernel: FileNotFoundError: gcc",)
    assert set(compiled.failures) >= set(told) if fails else compiled.failures == ()


@pytest.mark.parametrize("sizes", [GPU, REHEARSAL], ids=["report", "rehearsal"])
def test_launchers_are_built_for_the_gpu_that_is_there_alone(
    sizes: ReportSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(stages, "CompileAhead", lambda *_, **options: asked.update(options))
    stages._compile_ahead(sizes, (), "sm_90")
    assert asked["launchers"] == (sizes is GPU)


def test_processes_that_are_not_done_in_time_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = CompileAhead(_calls, "sm_90", processes=1, method="fork").wait(0.0)
    assert (compiled.kernels, compiled.finished) == (0, False)

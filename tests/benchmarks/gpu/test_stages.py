"""What the stages of the report measure, at tiny sizes on the CPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from benchmarks.gpu import end_to_end, stages
from benchmarks.gpu.compile_ahead import COMPILED
from benchmarks.gpu.findings import Findings, StageFailed
from benchmarks.gpu.kernels import earlier_measurements, engine_kernels, other_baselines
from benchmarks.gpu.library import library_peaks, measure_library, product_rate
from benchmarks.gpu.scaling import client_scaling
from benchmarks.gpu.shapes import VIT_BASE, VitShape
from benchmarks.gpu.sizes import REHEARSAL, Point
from benchmarks.gpu.tiles import using_form
from benchmarks.gpu.workload import Workload
from benchmarks.kernels.cases import ENGINE
from benchmarks.kernels.measure import TIME_UP, kernel_cases
from benchmarks.kernels.work import Peaks
from fedra_kernels import dispatch
from fedra_kernels._kernels.configs import Tile
from fedra_kernels._kernels.product_forms import GEMM_FORMS, Form

CPU = torch.device("cpu")
TINY = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)


def make_findings(tmp_path: Path, stage: str = "stage", *, seconds: float = 300.0) -> Findings:
    return Findings(tmp_path, stage, until=time.monotonic() + seconds)


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return make_findings(tmp_path)


def stored(tmp_path: Path, stage: str = "stage") -> dict[str, Any]:
    return dict(json.loads((tmp_path / f"{stage}.json").read_text()))


def test_both_checks_run_and_both_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(reason: str) -> Callable[..., None]:
        def run(*_: object) -> None:
            raise StageFailed(reason)

        return run

    monkeypatch.setattr(stages, "check_rounds", fail("rounds"))
    monkeypatch.setattr(stages, "check_ops", fail("ops"))
    (stage,) = (stage for stage in stages.report_stages(REHEARSAL, "sm_90") if stage.name == "checks")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(StageFailed, match=r"^rounds; ops$"):
        stage.run(make_findings(tmp_path))


def test_what_a_stage_still_compiles_is_told_and_where_all_was_compiled_ahead_it_should_be_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        assert triton.knobs.compilation.listener is not None
        for hit in (True, False):
            source = SimpleNamespace(name="a_kernel")
            triton.knobs.compilation.listener(src=source, metadata={}, metadata_group={}, times=None, cache_hit=hit)

    monkeypatch.setattr(stages, "end_to_end", work)
    monkeypatch.setattr(stages, "other_baselines", work)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    run = {stage.name: stage.run for stage in stages.report_stages(REHEARSAL, "sm_90")}
    for name, met in (("end_to_end", False), ("rest", None)):
        findings = make_findings(tmp_path)
        run[name](findings)
        (figure,) = findings.figures
        assert (figure.name, figure.value, figure.met) == (COMPILED, 1, met)
        assert findings.rows["kernels compiled"] == [{"kernel": "a_kernel"}]


def test_whole_rounds_are_measured_beside_peft_and_the_counted_work(findings: Findings, tmp_path: Path) -> None:
    sizes = replace(REHEARSAL, points=(Point(TINY, 2, 16, 2, 1), Point(TINY, 3, 1, 1, 1)))
    end_to_end.end_to_end(findings, sizes, CPU)
    rows = stored(tmp_path)["tables"]["rounds"]
    assert [(row["point"], row["clients"]) for row in rows] == [("ViT 2 × 16", 4), ("ViT 3 × 1", 6)]
    assert all(row["host_seconds_per_step"] > 0 for row in rows)
    figures = {figure.name: figure for figure in findings.figures}
    share = figures["ViT 2 × 16: share of torch's products' rate at these shapes"]
    assert share.target == "≥ 40"
    assert share.value == pytest.approx(100 * rows[0]["tflops"] / rows[0]["library_tflops"])
    assert share.expected is not None
    assert 0 < share.expected < 100
    many = figures["10,000 clients with 32 images, extrapolated from ViT 2 × 16"]
    assert many.value == pytest.approx(10_000 / rows[0]["clients_per_second"])
    assert not any("extrapolated from ViT 3 × 1" in name for name in figures)
    ratio = figures["ViT 3 × 1: over PEFT one client after another"].value
    assert ratio == pytest.approx(rows[1]["clients_per_second"] / rows[1]["peft_clients_per_second"])


def test_a_point_without_memory_is_told_and_the_others_are_measured(
    findings: Findings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cost = end_to_end.round_cost

    def without_memory(workload: Workload, executor: Any, round: Any, **options: Any) -> Any:
        if len(round.allocation) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return cost(workload, executor, round, **options)

    monkeypatch.setattr(end_to_end, "round_cost", without_memory)
    sizes = replace(REHEARSAL, points=(Point(TINY, 2, 1, 1, 1), Point(TINY, 3, 1, 1, 1)))
    with pytest.raises(StageFailed, match=r"^ViT 2 × 1: OutOfMemoryError: out of memory$"):
        end_to_end.end_to_end(findings, sizes, CPU)
    assert [row["point"] for row in stored(tmp_path)["tables"]["rounds"]] == ["ViT 3 × 1"]


def test_points_without_time_are_named(tmp_path: Path) -> None:
    findings = make_findings(tmp_path, seconds=1.0)
    end_to_end.end_to_end(findings, REHEARSAL, CPU)
    assert stored(tmp_path)["left_out"] == [point.name for point in REHEARSAL.points]


def test_a_round_trains_as_many_images_as_are_counted() -> None:
    workload = Workload.random(TINY, CPU, torch.float32)
    round = workload.round(3, samples=2, steps=4)
    for client in range(3):
        batches = list(round.work.batches(client))
        assert [len(batch) for batch in batches] == [2] * 4
    assert workload.flops(round) == round.allocation.sum() * 8 * TINY.block_flops()


@pytest.mark.parametrize("fuse", [True, False])
def test_how_many_blocks_were_fused_is_told_and_should_be_all(
    fuse: bool, findings: Findings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Workload, "random", partial(Workload.random, fuse_blocks=fuse))
    end_to_end.end_to_end(findings, replace(REHEARSAL, points=(Point(TINY, 2, 1, 1, 1), Point(None, 2, 1, 1, 1))), CPU)
    (figure, embedded) = (figure for figure in findings.figures if "blocks fused" in figure.name)
    expected = TINY.depth if fuse else 0
    assert (figure.value, figure.target, figure.met) == (expected, "3", fuse)
    assert embedded.target == ""
    assert stored(tmp_path)["tables"]["rounds"][0]["blocks_fused"] == expected


def test_scaling_measures_every_number_of_clients_for_which_there_is_time(tmp_path: Path) -> None:
    findings = make_findings(tmp_path, seconds=60.0)
    sizes = replace(REHEARSAL, scaling=(2, 5, 10**9), scaling_shape=TINY)
    client_scaling(findings, sizes, CPU)
    found = stored(tmp_path)
    assert [row["clients"] for row in found["tables"]["clients"]] == [2, 5]
    assert found["left_out"] == ["round of 1,000,000,000 clients × 1 images"]


def test_a_vit_base_client_needs_the_published_flops() -> None:
    # 6 blocks and 32 images: about 1.12 TFLOP forward and dX, beside attention's and the adapters' gradients.
    assert VIT_BASE.tokens == 197
    assert 6 * 32 * VIT_BASE.block_flops() == pytest.approx(1.12e12, rel=0.12)


def test_the_rates_of_an_earlier_stage_are_used_and_missing_ones_are_measured(tmp_path: Path) -> None:
    sizes = replace(REHEARSAL, products=((10, 32, 32),))
    measure_library(make_findings(tmp_path, "compile"), sizes, CPU)
    path = tmp_path / "compile.json"
    content = json.loads(path.read_text())
    content["tables"]["peaks"][0] |= {"flops": 1.0, "bandwidth": 2.0}
    content["tables"]["library products"][0] |= {"forward": 1e6, "backward": 3e6}
    path.write_text(json.dumps(content))
    assert library_peaks(tmp_path, sizes, CPU) == Peaks(content["tables"]["peaks"][0]["name"], 1.0, 2.0)
    shape = replace(TINY, width=32, hidden=32)
    flops = 6 * 4.0 * 10 * 32 * 32
    assert product_rate(tmp_path, sizes, CPU, shape, 10) == pytest.approx(flops / (6 * 4e6))
    assert product_rate(tmp_path, sizes, CPU, shape, 11) > 1e3


def test_the_ops_come_first_and_the_other_baselines_in_a_stage_of_their_own(tmp_path: Path) -> None:
    engine_kernels(make_findings(tmp_path, "kernels"), REHEARSAL, CPU)
    first = stored(tmp_path, "kernels")
    rows = first["tables"]["kernels"]
    assert {row["provider"] for row in rows} == {ENGINE, "frozen", "copy"}
    assert all(row["over_expected"] == pytest.approx(row["p50"] / row["expected"]) for row in rows)
    # Of nobody else is anything expected.
    assert {row["provider"] for row in rows if row["far_off"]} <= {ENGINE}
    targets = [figure["name"] for figure in first["figures"] if figure["target"]]
    assert len(targets) == 6
    assert all(figure["expected"] for figure in first["figures"] if figure["target"])
    blocks = [figure for figure in first["figures"] if figure["name"].startswith("block of a ")]
    assert [figure["name"].partition(",")[0] for figure in blocks] == ["block of a ViT"] * 2 + ["block of a LLaMA"] * 2
    assert all(figure["value"] > 0 and figure["expected"] > 0 for figure in blocks)
    other_baselines(make_findings(tmp_path, "rest"), REHEARSAL, CPU)
    second = stored(tmp_path, "rest")
    found = {(row["kernel"], row["mode"], row["x"], row["provider"]) for row in second["tables"]["kernels"]}
    cases = kernel_cases(REHEARSAL.block(CPU), REHEARSAL.second_block(CPU))
    everyone = {(case.kernel, case.mode, case.x, name) for case in cases for name in case.providers}
    assert found == {key for key in everyone if key[3] not in (ENGINE, "frozen", "copy") and "compile" not in key[3]}
    # Their denominators were timed by the first stage.
    assert "over_denominator" in (tmp_path / "rest.csv").read_text()
    assert ",expected," not in (tmp_path / "rest.csv").read_text()


def test_timings_without_time_are_counted(tmp_path: Path) -> None:
    findings = make_findings(tmp_path, seconds=1.5)
    engine_kernels(findings, REHEARSAL, CPU)
    found = stored(tmp_path)
    assert {row["error"] for row in found["tables"]["kernels"]} == {TIME_UP}
    count = len(found["tables"]["kernels"])
    assert found["left_out"][0] == f"{count} of {count} kernel timings"
    assert earlier_measurements(tmp_path, kernel_cases(REHEARSAL.block(CPU), REHEARSAL.second_block(CPU))) == []


def test_a_form_replaces_the_tables_entry_for_a_while() -> None:
    form = Form(Tile(64, 64, 64, 4, 2), "tried")
    before = GEMM_FORMS["sm_90"]["narrow"]
    with using_form(form, "sm_90", torch.bfloat16, 16):
        assert GEMM_FORMS["sm_90"]["narrow"] == [form]
    assert GEMM_FORMS["sm_90"]["narrow"] == before

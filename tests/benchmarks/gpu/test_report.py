"""The GPU report's stages at tiny sizes on the CPU."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedra_engine.benchmarks.gpu import ops
from fedra_engine.benchmarks.gpu.checks import check_ops, check_rounds
from fedra_engine.benchmarks.gpu.end_to_end import client_scaling, end_to_end, lanes_for
from fedra_engine.benchmarks.gpu.findings import Figure, Findings, StageFailed, at_least
from fedra_engine.benchmarks.gpu.kernels import kernel_stage
from fedra_engine.benchmarks.gpu.stages import STAGES, Stage, StageOutcome, run_stages
from fedra_engine.benchmarks.gpu.summary import read_findings, short_table, write_report
from fedra_engine.benchmarks.gpu.workload import VIT_BASE, VitShape, Workload
from fedra_engine.benchmarks.kernels.cases import cpu_sizes

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
LAUNCHER = ROOT / "launchers" / "gpu_report.py"
TINY = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path, "stage", seconds=300.0)


def stored(tmp_path: Path) -> dict[str, object]:
    return json.loads((tmp_path / "stage.json").read_text())


def test_the_sweep_is_compared_with_the_sequential_executor(findings: Findings, tmp_path: Path) -> None:
    sizes = {"gemm_size": 64, "sequential_clients": 2, "steps": 1}
    end_to_end(findings, CPU, torch.bfloat16, TINY, images=(16, 2), lanes=lambda images: 2, **sizes)
    rows = stored(tmp_path)["tables"]["end to end"]
    assert [(row["images"], row["pixels"]) for row in rows] == [(16, "host"), (2, "host"), (16, "device")]
    for row in rows[:2]:
        assert row["ratio"] == pytest.approx(row["clients_per_second"] / row["sequential_clients_per_second"])
    share = next(figure for figure in findings.figures if "share of the GEMM rate" in figure.name)
    assert share.target == "≥ 40"


def test_scaling_measures_every_number_of_clients_for_which_there_is_time(tmp_path: Path) -> None:
    findings = Findings(tmp_path, "stage", seconds=60.0)
    client_scaling(findings, CPU, torch.float32, TINY, clients=(2, 5, 10**9), lanes=2, images=1)
    rows = stored(tmp_path)["tables"]["clients"]
    assert [row["clients"] for row in rows] == [2, 5, 10**9]
    assert all(row["clients_per_second"] > 0 for row in rows[:2])
    assert rows[2]["error"] == "the time was up"


def test_64_lanes_go_with_the_16_images_of_the_target() -> None:
    assert [lanes_for(images) for images in (1, 4, 16, 32)] == [256, 256, 64, 32]


def test_a_vit_base_client_needs_the_published_flops() -> None:
    # 6 blocks and 32 images: about 1.12 TFLOP forward and dX, beside attention's and the adapters' gradients.
    assert VIT_BASE.tokens == 197
    assert 6 * 32 * VIT_BASE.block_flops() == pytest.approx(1.12e12, rel=0.12)


def test_a_bf16_model_keeps_float32_adapters(findings: Findings) -> None:
    workload = Workload(TINY, CPU, torch.bfloat16)
    assert workload.foundation.dtype == torch.bfloat16
    assert workload.state.adapters.dtype == workload.state.heads.dtype == torch.float32


def test_rounds_agree_again_in_other_lanes_and_with_peft(findings: Findings) -> None:
    check_rounds(findings, CPU)
    assert len(findings.figures) == 3
    assert all(figure.met for figure in findings.figures)


def test_an_op_that_depends_on_its_neighbours_fails_the_check(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def op(cohort: ops.Cohort) -> ops.Results:
        return {"y": torch.full((cohort.groups.rows, 1), float(len(cohort.groups)))}

    monkeypatch.setattr(ops, "OPS", {"broken": op})
    with pytest.raises(StageFailed, match=r"broken \(repeats, alone differs by"):
        check_ops(findings, CPU, torch.float32, sizes=(3, 2))


@pytest.mark.parametrize("name", ops.OPS)
def test_the_op_checks_compare_a_clients_own_results(name: str) -> None:
    sizes, widths = (6, 1, 3), ops.Widths(inputs=40, outputs=24, rank=4, classes=7)
    together = ops.run_op(name, sizes, range(3), CPU, torch.float32, widths=widths)
    alone = ops.run_op(name, sizes, [2], CPU, torch.float32, widths=widths)
    for key, values in alone.items():
        torch.testing.assert_close(ops.part_of(together[key], sizes, 2), values, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ops.part_of(together[key], sizes, 0), values)


def test_the_kernel_stage_leaves_figures_and_a_csv(findings: Findings, tmp_path: Path) -> None:
    sizes = replace(cpu_sizes(), clients=2, samples=1, tokens=3, width=16, hidden=32, rank=4, slots=4, blocks=2)
    kernel_stage(findings, CPU, sizes, gemm_size=64, seconds=0.0005)
    names = [figure.name for figure in findings.figures if figure.target]
    assert len(names) == 6
    assert (tmp_path / "kernels.csv").read_text().count("\n") > 100
    assert (tmp_path / "kernels.png").exists()


def test_end_to_end_names_the_points_it_had_no_time_for(tmp_path: Path) -> None:
    findings = Findings(tmp_path, "stage", seconds=1.0)
    end_to_end(findings, CPU, torch.float32, TINY, images=(1, 2), lanes=lambda images: 1, gemm_size=16)
    assert [row["error"] for row in stored(tmp_path)["tables"]["end to end"]] == ["the time was up"] * 2


def test_every_stage_can_be_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    parse = runpy.run_path(str(LAUNCHER), run_name="imported")["_parse"]
    for stage in STAGES:
        assert parse(["out", "--stage", stage.name]).stage == stage.name


def test_stages_together_take_less_than_eight_minutes() -> None:
    assert sum(stage.seconds + 12 for stage in STAGES) < 480


def test_a_failing_stage_is_one_line_and_the_next_still_runs(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import sys, pathlib\n"
        "folder, _, name = sys.argv[1:]\n"
        "if name == 'first': raise RuntimeError('illegal address\\nCompile with DSA')\n"
        "if name == 'slow': import time; time.sleep(60)\n"
    )
    stages = [Stage("first", 60.0, _never), Stage("slow", -11.0, _never), Stage("last", 60.0, _never)]
    outcomes = run_stages(launcher, tmp_path, stages)
    assert [outcome.error for outcome in outcomes][::2] == ["RuntimeError: illegal address", ""]
    assert outcomes[1].error.startswith("stopped after")


def _never(findings: Findings, device: torch.device) -> None:
    raise AssertionError


def test_the_report_shows_figures_targets_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    findings = Findings(tmp_path, "kernels", seconds=1.0)
    findings.figure(at_least("share", 31.0, 40.0, "%"))
    findings.figure(Figure("rate", 700.0, "TFLOP/s"))
    findings.row("kernels", {"op": "a|b", "seconds": 0.5})
    outcomes = [StageOutcome("tests", 3.0, "no such file"), StageOutcome("kernels", 5.0, "")]
    found = read_findings(tmp_path, outcomes)
    write_report(tmp_path, "GPU X", "torch 2", outcomes, found)
    markdown = (tmp_path / "report.md").read_text()
    assert "| share | 31 % | ≥ 40 | NO |" in markdown
    assert "Failed: no such file" in markdown
    assert json.loads((tmp_path / "report.json").read_text())["stages"][0]["error"] == "no such file"
    Console(width=120).print(short_table("GPU X", outcomes, found))
    assert "FAILED: no such file" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_launcher_says_so_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCHER), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: device: found no GPU")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_report_needs_neither_datasets_nor_jsonargparse_nor_deepspeed(tmp_path: Path) -> None:
    program = f'''
import sys
class WithoutThem:
    """A finder for which some packages are not installed."""
    def __init__(self, finder): self._finder = finder
    def __getattr__(self, name): return getattr(self._finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "jsonargparse", "deepspeed"):
            return None
        return self._finder.find_spec(name, path, target)
sys.meta_path[:] = [WithoutThem(finder) for finder in sys.meta_path]
import runpy
runpy.run_path({str(LAUNCHER)!r}, run_name="imported")
import torch
from pathlib import Path
from fedra_engine.benchmarks.gpu import checks, kernels, pytest_stage, stages, summary
from fedra_engine.benchmarks.kernels import command
from fedra_engine.benchmarks.gpu.end_to_end import client_scaling
from fedra_engine.benchmarks.gpu.findings import Findings
from fedra_engine.benchmarks.gpu.workload import VitShape, Workload
shape = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)
workload = Workload(shape, torch.device("cpu"), torch.float32)
round = workload.round(2, images=1, steps=1)
workload.train(workload.sweep(2), round)
workload.train(workload.sequential(), round)
assert not {{"datasets", "jsonargparse", "deepspeed"}} & set(sys.modules)
'''
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

"""The whole report without a GPU: the launcher, every stage, and what is left afterwards."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import pack as pack_module
from benchmarks.gpu.packing import FILES
from benchmarks.gpu.report import _LEAST_SECONDS, _SECONDS_TO_PACK
from benchmarks.gpu.sizes import GPU, REHEARSAL
from benchmarks.gpu.stage_process import STAGES
from benchmarks.gpu.stages import report_stages
from benchmarks.kernels.report import Record
from fedra_engine.runtime.errors import InputError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LAUNCHER = ROOT / "launchers" / "gpu_report.py"
NAMES = list(STAGES)
PROGRAM = f'''
import runpy, sys
missing = set(sys.argv.pop(1).split(","))
class WithoutThem:
    """A finder for which some packages are not installed."""
    def __init__(self, finder): self._finder = finder
    def __getattr__(self, name): return getattr(self._finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            return None
        return self._finder.find_spec(name, path, target)
sys.meta_path[:] = [WithoutThem(finder) for finder in sys.meta_path]
try:
    runpy.run_path({str(LAUNCHER)!r}, run_name="__main__")
finally:
    assert not missing & set(sys.modules)
'''


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(LAUNCHER), *arguments], capture_output=True, text=True, check=False)


def run_without(packages: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The launcher where these packages are not installed."""
    program = [sys.executable, "-c", PROGRAM, ",".join(packages), *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT.parent)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launcher as a module; what its import changes in this process is undone afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    spec = importlib.util.spec_from_file_location("gpu_report", LAUNCHER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rehearsal_runs_every_stage_without_some_packages_and_leaves_the_files_of_a_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    # Packages that a GPU machine lacks.
    ended = run_without(("datasets", "deepspeed"), "--rehearse", str(output))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    assert max(path.stat().st_size for path in output.iterdir()) < 16 << 20
    lines = ended.stdout.splitlines()
    assert all(line.startswith(REHEARSAL.notice) for line in lines)
    assert lines[-1].removeprefix(REHEARSAL.notice).startswith("└")
    report = json.loads((output / "report.json").read_text())
    assert report["notice"] == REHEARSAL.notice
    found = {stage["stage"]: stage for stage in report["stages"]}
    assert [(name, stage["state"]) for name, stage in found.items()] == [(name, "done") for name in NAMES]
    assert (output / "report.md").read_text().splitlines()[2] == "**rehearsal, no GPU's figure.**"
    # Each stage did its work.
    tables = {name: set(stage["tables"]) for name, stage in found.items()}
    assert tables["compile"] >= {"peaks", "library products"}
    assert tables["kernels"] >= {"kernels", "tiles"}
    figures = {name: {figure["name"]: figure for figure in stage["figures"]} for name, stage in found.items()}
    assert figures["compile"]["kernels compiled ahead"]["value"] > 0
    assert figures["tests"]["tests passed"]["met"]
    points = {point.name for point in REHEARSAL.points}
    assert {row["point"] for row in found["end_to_end"]["tables"]["rounds"]} == points
    assert {row["point"] for row in found["end_to_end"]["tables"]["other kernels of a step"]} == points
    assert sum("no CUDA graphs without a GPU" in name for name in figures["end_to_end"]) == 5
    assert [row["clients"] for row in found["scaling"]["tables"]["clients"]] == list(REHEARSAL.scaling)
    rows = list(csv.DictReader((output / "kernels.csv").open()))
    assert list(rows[0]) == list(Record.__dataclass_fields__)
    providers = {row["provider"] for row in rows}
    assert {"fedra", "frozen", "copy", "PEFT, client by client", "expected"} <= providers
    assert any(provider.startswith("fedra 128×128×64") for provider in providers)
    with tarfile.open(output / "logs.tgz") as archive:
        assert sorted(archive.getnames()) == sorted(f"{name}.{kind}" for name in NAMES for kind in ("json", "log"))


def test_the_stages_of_a_report_fit_into_seven_minutes() -> None:
    stages = report_stages(GPU, "sm_90")
    assert [stage.name for stage in stages] == NAMES
    # Libraries and a first look at the GPU take about 16 s before the first stage; the last one starts in any case.
    least = _SECONDS_TO_PACK + _LEAST_SECONDS
    assert 16.0 + sum(stage.seconds or 0.0 for stage in stages) <= GPU.total - least
    assert GPU.total <= 420.0
    assert [stage.name for stage in stages if stage.seconds is None] == ["rest"]
    assert [stage.name for stage in stages if stage.essential] == ["smoke"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_launcher_says_so_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    ended = run(str(tmp_path / "out"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: device: found no GPU")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_pytest_the_launcher_says_so_in_one_line(tmp_path: Path) -> None:
    ended = run_without(("pytest", "hypothesis"), "--rehearse", str(tmp_path / "out"))
    assert ended.stderr.splitlines()[-1].startswith("error: pytest, hypothesis: found no such package")
    assert (ended.returncode, (tmp_path / "out").exists()) == (2, False)


def test_an_unknown_stage_is_one_line_and_2(tmp_path: Path) -> None:
    ended = run("--only", "smoke,nothing", str(tmp_path / "out"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: gpu_report.py: --only: found nothing, expected some of smoke, compile")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are folders a, b and c here."""
    for name in "abc":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "a"), "--images and --model go together, with --study or --pack only"),
        (("--images", "a", "--model", "b"), "--images and --model go together, with --study or --pack only"),
        (("--pack", "--model", "b"), "--images and --model go together, with --study or --pack only"),
        (("--study", "accuracy", "--images", "a", "--model", "b", "--only", "smoke"), "--only goes without"),
        (("--pack", "--images", "a", "--model", "b", "--only", "smoke"), "--only goes without --study and --pack"),
        (("--seconds", "9"), "--seconds goes with --study only"),
        (("--pack", "--images", "a", "--model", "b", "--seconds", "9"), "--seconds goes with --study only"),
        (("--rehearse", "--continue", "a"), "--continue goes with --study only"),
        (("--study", "accuracy", "--images", "a", "--model", "b", "--limit", "9"), "--limit goes with --pack only"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments: tuple[str, ...], message: str, launcher: Any) -> None:
    with pytest.raises(InputError, match=f"^gpu_report.py: {re.escape(message)}"):
        launcher._parse([*arguments, "out"])


@pytest.mark.usefixtures("folders")
def test_options_that_go_together_are_taken(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher._parse(["out"]).only == STAGES
    assert launcher._parse(["--only", "smoke,rest", "out"]).only == ["smoke", "rest"]
    inputs = ["--images", "a", "--model", "b", "out"]
    study = launcher._parse(["--study", "accuracy", "--seconds", "9", "--continue", "c", *inputs])
    assert (study.seconds, study.earlier) == (9.0, Path("c"))
    asked: list[float] = []
    monkeypatch.setattr(pack_module, "pack", lambda *_, limit_mib: asked.append(limit_mib))
    for limit in ([], ["--limit", "70"]):
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--pack", *limit, *inputs])
        launcher.main()
    assert asked == [pack_module.LIMIT_MIB, 70.0]

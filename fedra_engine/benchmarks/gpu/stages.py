"""The stages of the GPU report, each in a process of its own.

A kernel that reads out of bounds takes the whole process's GPU state with it; so one stage cannot harm the next.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedra_engine.benchmarks.gpu.findings import Findings, StageFailed

ROOT = Path(__file__).parents[3]
_START_SECONDS = 12.0
"""What a process takes to import its libraries; not the stage's."""


@dataclass(frozen=True)
class Stage:
    """A part of the report: `run(findings, device)` within `seconds`."""

    name: str
    seconds: float
    run: Callable[[Findings, torch.device], None]


def _checks(findings: Findings, device: torch.device) -> None:
    from fedra_engine.benchmarks.gpu.checks import check_ops, check_rounds

    failed = []
    for check in (lambda: check_rounds(findings, device), lambda: check_ops(findings, device, torch.bfloat16)):
        try:
            check()
        except StageFailed as error:
            failed.append(str(error))
    if failed:
        raise StageFailed("; ".join(failed))


def _kernels(findings: Findings, device: torch.device) -> None:
    from fedra_engine.benchmarks.gpu.kernels import kernel_stage
    from fedra_engine.benchmarks.kernels.cases import vit_base

    kernel_stage(findings, device, vit_base(device), gemm_size=8192, seconds=0.15)


def _end_to_end(findings: Findings, device: torch.device) -> None:
    from fedra_engine.benchmarks.gpu.end_to_end import end_to_end
    from fedra_engine.benchmarks.gpu.workload import VIT_BASE

    end_to_end(findings, device, torch.bfloat16, VIT_BASE)


def _scaling(findings: Findings, device: torch.device) -> None:
    from fedra_engine.benchmarks.gpu.end_to_end import client_scaling
    from fedra_engine.benchmarks.gpu.workload import VIT_BASE

    client_scaling(findings, device, torch.bfloat16, VIT_BASE)


def _tests(findings: Findings, device: torch.device) -> None:
    from fedra_engine.benchmarks.gpu.pytest_stage import run_gpu_tests

    run_gpu_tests(findings, ROOT)


STAGES = (
    Stage("tests", 90.0, _tests),
    Stage("checks", 40.0, _checks),
    Stage("kernels", 110.0, _kernels),
    Stage("end_to_end", 100.0, _end_to_end),
    Stage("scaling", 50.0, _scaling),
)
"""In the order they run. With the starts of their processes they stay below eight minutes."""


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended; `error` is one line, empty when all went well."""

    stage: str
    seconds: float
    error: str


def run_stage(name: str, folder: Path, device: torch.device) -> None:
    """Run one stage in this process; its findings go to `folder`."""
    (stage,) = (stage for stage in STAGES if stage.name == name)
    stage.run(Findings(folder, name, seconds=stage.seconds), device)


def run_stages(launcher: Path, folder: Path, stages: Sequence[Stage] = STAGES) -> list[StageOutcome]:
    """Run `launcher` FOLDER --stage NAME for every stage; its output goes to FOLDER/NAME.log."""
    outcomes = []
    for stage in stages:
        started = time.monotonic()
        error = _run_process([sys.executable, str(launcher), str(folder), "--stage", stage.name], folder, stage)
        outcomes.append(StageOutcome(stage.name, time.monotonic() - started, error))
    return outcomes


def _run_process(command: Sequence[str], folder: Path, stage: Stage) -> str:
    log = folder / f"{stage.name}.log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, timeout=stage.seconds + _START_SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {stage.seconds:.0f} s; what it had found is kept"
    if code == 0:
        return ""
    return _one_line_error(log.read_text(errors="replace")) or f"ended with exit code {code}"


def _one_line_error(log: str) -> str:
    """The last line that names an exception (CUDA's messages go on below it), empty without one."""
    named = re.findall(r"^(?:\w+\.)*(\w*(?:Error|Failed|Exception|Exit)\b.*)$", log, flags=re.MULTILINE)
    return str(named[-1])[:300] if named else ""

"""Stages for tests of the report: some go well, some break in every way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.gpu.findings import Figure, Findings, StageFailed
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.report import Settings, run_report
from benchmarks.gpu.stage_process import Stage

MACHINE = Machine("a device", "sm_90", "torch 0")


def good(findings: Findings) -> None:
    findings.figure(Figure("answer", 42.0))
    findings.csv.write_text("kernel,p50\na,1\n")


def crash(findings: Findings) -> None:
    findings.figure(Figure("found before", 1.0))
    os._exit(7)


def abort(findings: Findings) -> None:
    findings.figure(Figure("found before", 1.0))
    os.abort()


def hang(findings: Findings) -> None:
    findings.figure(Figure("found before", 1.0))
    time.sleep(600)


def run_out_of_gpu_memory(findings: Findings) -> None:
    findings.figure(Figure("found before", 1.0))
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")


def run_out_of_memory(findings: Findings) -> None:
    findings.figure(Figure("found before", 1.0))
    raise MemoryError


def find_something_wrong(findings: Findings) -> None:
    findings.figure(Figure("found before", 1.0))
    raise StageFailed("it differs by 3")


def report(
    stages: Sequence[Stage], output: Path, *, total: float = 300.0, refresh: float = 60.0, notice: str = ""
) -> int:
    """Run a report of these stages."""
    settings = Settings(total, time.monotonic(), refresh, notice, "python a_report.py")
    return run_report(stages, MACHINE, output, settings)


def stage(
    name: str, run: Callable[[Findings], None], seconds: float | None = 60.0, *, essential: bool = False
) -> Stage:
    return Stage(name, seconds, run, essential)

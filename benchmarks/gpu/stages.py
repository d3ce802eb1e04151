"""The stages of the report, in the order they run: what decides comes first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.checks import check_ops, check_rounds
from benchmarks.gpu.compile_ahead import COMPILED, CompileAhead, compilations, usable_processes
from benchmarks.gpu.compile_calls import calls_of
from benchmarks.gpu.end_to_end import end_to_end
from benchmarks.gpu.findings import Figure, Findings, StageFailed, at_most
from benchmarks.gpu.kernels import engine_kernels, other_baselines
from benchmarks.gpu.library import measure_library
from benchmarks.gpu.scaling import client_scaling
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.gpu.smoke import smoke
from benchmarks.gpu.stage_process import STAGES, Stage
from fedra_kernels import dispatch

ROOT = Path(__file__).parents[2]
_COMPILED_AHEAD = ("end_to_end", "scaling")
"""Stages in which nothing should be left to compile."""
_COUNT_THEMSELVES = ("compile", "tests")
"""Stages of which other processes compile."""
_SECONDS_TO_END = 2.0
"""Kept to write down what was found."""

Work = Callable[[Findings, ReportSizes, torch.device], None]


def report_stages(sizes: ReportSizes, architecture: str) -> list[Stage]:
    """All stages, for a device of an architecture (a column of the kernels' configuration tables)."""
    target = sizes.compile_for or architecture
    work: list[Work] = [
        partial(_smoke, architecture=target),
        partial(_compile, architecture=target),
        engine_kernels,
        end_to_end,
        _tests,
        _checks,
        client_scaling,
        other_baselines,
    ]
    return [
        Stage(name, sizes.limits.get(name), partial(_run, name, run, sizes), essential=name == "smoke")
        for name, run in zip(STAGES, work, strict=True)
    ]


def _run(name: str, work: Work, sizes: ReportSizes, findings: Findings) -> None:
    _choose_path(sizes, name)
    with compilations() as compiled:
        try:
            work(findings, sizes, torch.device(sizes.device))
        finally:
            if name in _COMPILED_AHEAD:
                findings.figure(at_most(COMPILED, len(compiled), 0))
            elif name not in _COUNT_THEMSELVES:
                findings.figure(Figure(COMPILED, len(compiled)))
            for kernel in compiled:
                findings.row("kernels compiled", {"kernel": kernel})


def _choose_path(sizes: ReportSizes, part: str) -> None:
    """On a CPU: whether the kernels run in the interpreter, or their torch path."""
    dispatch.INTERPRETED = part in sizes.interpreted


def _smoke(findings: Findings, sizes: ReportSizes, device: torch.device, *, architecture: str) -> None:
    if sizes.smoke_compiled:
        _compile_ahead(sizes, sizes.smoke_compiled, architecture).wait(findings.seconds_left / 2)
    smoke(findings, sizes, device)


def _compile(findings: Findings, sizes: ReportSizes, device: torch.device, *, architecture: str) -> None:
    # Before this process touches the GPU, so that others can be forked from it.
    ahead = _compile_ahead(sizes, sizes.compiled, architecture)
    measure_library(findings, sizes, device)
    compiled = ahead.wait(findings.seconds_left - _SECONDS_TO_END)
    findings.figure(Figure("kernels compiled ahead", compiled.kernels))
    if not compiled.finished:
        findings.leave_out("kernels that were not compiled in time")
    if compiled.failures:
        raise StageFailed("; ".join(compiled.failures)[:500])


def _compile_ahead(sizes: ReportSizes, groups: tuple[str, ...], architecture: str) -> CompileAhead:
    make = partial(calls_of, sizes, groups)
    # Launchers are linked against the driver, which only a machine with a GPU has.
    launchers = sizes.compile_for is None
    return CompileAhead(make, architecture, processes=usable_processes(), method=sizes.workers, launchers=launchers)


def _tests(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    # Only this stage needs pytest.
    from benchmarks.gpu.pytest_stage import run_tests

    run_tests(
        findings,
        ROOT,
        selection=sizes.tests,
        marker=sizes.marker,
        keyword=sizes.keyword,
        most_processes=sizes.most_processes,
    )


def _checks(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    failed = []
    for part, check in (("checked rounds", check_rounds), ("checked ops", check_ops)):
        _choose_path(sizes, part)
        # The second also where the first fails.
        try:
            check(findings, sizes, device)
        except StageFailed as error:
            failed.append(str(error))
    if failed:
        raise StageFailed("; ".join(failed))

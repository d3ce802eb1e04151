"""The GPU tests as a stage of the GPU report, by several processes on the one GPU.

Most of their time goes into compiling kernels, which needs one CPU core each and leaves the GPU idle.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from fedra_engine.benchmarks.gpu.findings import Figure, Findings, StageFailed

_MOST_PROCESSES = 6
"""Each holds a CUDA context and the tensors of one test."""


class _Part:
    """A pytest plugin that runs every n-th test and reports each to the parent process as soon as it is over."""

    def __init__(self, part: int, parts: int, outcomes: SimpleQueue[tuple[str, str]]) -> None:
        self._part, self._parts, self._outcomes = part, parts, outcomes

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._part :: self._parts]

    def pytest_runtest_setup(self) -> None:
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            pytest.exit("the stage was stopped")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcomes.put((report.nodeid, " ".join(str(report.longrepr).splitlines()[-1:]) or "failed"))
        elif report.when == "call" and report.passed:
            self._outcomes.put((report.nodeid, ""))


def run_gpu_tests(
    findings: Findings, root: Path, *, selection: str = "tests/gpu", marker: str = "gpu", processes: int | None = None
) -> None:
    """Run the tests below `root`/`selection` that bear `marker`.

    Raises:
        StageFailed: a test failed, a process broke off, or there was no test to run.
    """
    parts = processes or max(min((os.cpu_count() or 1) // 2, _MOST_PROCESSES), 1)
    context = multiprocessing.get_context("spawn")
    # A plain queue writes at once; one with a thread of its own loses what a process sent just before it broke off.
    outcomes: SimpleQueue[tuple[str, str]] = context.SimpleQueue()
    workers = [
        context.Process(target=_run_part, args=(root, selection, marker, part, parts, outcomes))
        for part in range(parts)
    ]
    for worker in workers:
        worker.start()
    passed, failed = 0, []
    running = True
    while running:
        # Checked before the queue is read: what a process sent before it ended is not lost.
        running = any(worker.is_alive() for worker in workers)
        while not outcomes.empty():
            test, reason = outcomes.get()
            if reason:
                failed.append(test)
                findings.row("failures", {"test": test, "reason": reason[:300]})
            else:
                passed += 1
        time.sleep(0.1)
    # A part of few tests may have none to run.
    codes = {worker.exitcode for worker in workers} - {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    good = passed > 0 and not failed and not codes
    findings.figure(Figure("GPU tests passed", passed, "", "all", good))
    if failed:
        raise StageFailed(f"{len(failed)} of {passed + len(failed)}: {failed[0]}")
    if not good:
        raise StageFailed(f"pytest ended with {sorted(map(str, codes)) or 'no test'} for {selection}")


def _run_part(
    root: Path, selection: str, marker: str, part: int, parts: int, outcomes: SimpleQueue[tuple[str, str]]
) -> None:
    options = ["-m", marker, "-q", "-p", "no:cacheprovider", "--rootdir", str(root), "-c", str(root / "pyproject.toml")]
    code = pytest.main([*options, str(root / selection)], plugins=[_Part(part, parts, outcomes)])
    raise SystemExit(int(code))

"""Tests as a stage of the GPU report, by several processes on the one GPU.

Most of their time goes into compiling kernels, which needs one CPU core each and leaves the GPU idle.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.compile_ahead import COMPILED, compilations, usable_processes
from benchmarks.gpu.findings import Figure, Findings, StageFailed
from fedra_engine.runtime.exit_codes import die_with_parent

Event = tuple[str, str, str]
"""What happened ("begun", "passed", "failed", "skipped", "over"), to which test, and why or how much it compiled."""

FAILURES = "tests-failures.log"
"""File in the findings' folder with what pytest tells of each failure, at once: pytest itself tells at the end."""
_SECONDS_TO_END = 3.0
"""Kept to write down what was found."""


class _Part:
    """A pytest plugin that runs every n-th test and tells the parent process of each as soon as it is over."""

    def __init__(self, part: int, parts: int, events: SimpleQueue[Event], compiled: list[str], failures: Path) -> None:
        """`compiled` grows with every kernel that this process compiles; all processes append to `failures`."""
        self._part, self._parts, self._events, self._compiled = part, parts, events, compiled
        self._failures = failures

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._part :: self._parts]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._events.put(("begun", nodeid, ""))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._failures.open("a") as file:
                file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
            self._events.put(("failed", report.nodeid, _reason(report)))
        elif report.skipped:
            self._events.put(("skipped", report.nodeid, _reason(report)))
        elif report.when == "call" and report.passed:
            self._events.put(("passed", report.nodeid, ""))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._events.put(("over", nodeid, str(len(self._compiled))))
        self._compiled.clear()


def _reason(report: pytest.TestReport) -> str:
    """Why a test failed or was skipped, in one line of at most 300 characters."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = crash.message
    elif isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        text = report.longreprtext
    return " ".join(text.split())[:300] or str(report.outcome)


class _Tally:
    """What became of the tests."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.passed = self.compiled = 0
        self.failed: list[str] = []
        self.skipped = 0
        self.begun: set[str] = set()

    def take(self, events: SimpleQueue[Event]) -> None:
        """Take note of all events that have come."""
        while not events.empty():
            kind, test, reason = events.get()
            if kind == "begun":
                self.begun.add(test)
            elif kind == "over":
                self.begun.discard(test)
                self.compiled += int(reason)
            elif kind == "passed":
                self.passed += 1
            elif kind == "skipped":
                self.skipped += 1
                self._findings.row("skipped", {"test": test, "reason": reason})
            else:
                self.failed.append(test)
                self._findings.row("failures", {"test": test, "reason": reason})


def run_tests(
    findings: Findings,
    root: Path,
    *,
    selection: str,
    marker: str,
    keyword: str = "",
    most_processes: int,
    method: str = "fork",
) -> None:
    """Run the tests in `root`/`selection` that pytest's options -m `marker` and -k `keyword` choose.

    By a process on every core but two, but by two at least and `most_processes` at most, which start by `method`.

    Raises:
        StageFailed: a test failed, a process broke off, the time was up, or there was no test to run.
    """
    context: Any = multiprocessing.get_context(method)
    # A plain queue writes at once; one with a thread of its own loses what a process sent just before it broke off.
    events: SimpleQueue[Event] = context.SimpleQueue()
    parts = max(min(usable_processes(), most_processes), 2)
    options = [str(root / selection), "-m", marker, *(["-k", keyword] if keyword else [])]
    failures = findings.folder / FAILURES
    workers = [
        context.Process(target=_run_part, args=(root, options, part, parts, events, failures)) for part in range(parts)
    ]
    for worker in workers:
        worker.start()
    tally = _Tally(findings)
    running = True
    while running and findings.seconds_left > _SECONDS_TO_END:
        # Checked before the queue is read: what a process sent before it ended is not lost.
        running = any(worker.is_alive() for worker in workers)
        tally.take(events)
        time.sleep(0.05)
    for worker in workers:
        worker.kill()
        worker.join()
    for test in sorted(tally.begun):
        findings.row("failures", {"test": test, "reason": "had not ended"})
    if running:
        findings.leave_out(f"tests after the first {tally.passed + len(tally.failed) + tally.skipped}")
    # A part of few tests may have none to run.
    codes = {worker.exitcode for worker in workers} - {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    _conclude(findings, tally, selection, running, sorted(map(str, codes)))


def _conclude(findings: Findings, tally: _Tally, selection: str, running: bool, codes: list[str]) -> None:
    good = tally.passed > 0 and not tally.failed and not running and not codes
    # A skipped test fails nothing, but not all have passed.
    target = f"all; {tally.skipped} skipped" if tally.skipped else "all"
    findings.figure(Figure("tests passed", tally.passed, "", target, good and not tally.skipped))
    findings.figure(Figure(COMPILED, tally.compiled))
    if tally.failed:
        raise StageFailed(f"{len(tally.failed)} of {tally.passed + len(tally.failed)}: {tally.failed[0]}")
    if running:
        raise StageFailed(f"the time was up after {tally.passed} tests")
    if not good:
        broken = f" in {sorted(tally.begun)[0]}" if tally.begun else ""
        raise StageFailed(f"pytest ended with {codes or 'no test'} for {selection}{broken}")


def _run_part(
    root: Path, options: list[str], part: int, parts: int, events: SimpleQueue[Event], failures: Path
) -> None:
    die_with_parent()
    always = ["-q", "-p", "no:cacheprovider", "--rootdir", str(root), "-c", str(root / "pyproject.toml")]
    with compilations() as compiled:
        code = pytest.main([*options, *always], plugins=[_Part(part, parts, events, compiled, failures)])
    raise SystemExit(int(code))

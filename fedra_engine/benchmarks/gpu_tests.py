"""The GPU tests as a stage of the GPU report."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedra_engine.benchmarks.gpu_findings import Figure, Findings, StageFailed


class _Outcomes:
    """A pytest plugin that notes every test as soon as it is over."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.passed = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
            reason = " ".join(str(report.longrepr).splitlines()[-1:])
            self._findings.row("failures", {"test": report.nodeid, "reason": reason[:300]})
        elif report.when == "call" and report.passed:
            self.passed += 1


def run_gpu_tests(findings: Findings, root: Path, *, selection: str = "tests/gpu", marker: str = "gpu") -> None:
    """Run the tests below `root`/`selection` that bear `marker`.

    Raises:
        StageFailed: a test failed, or there was none to run.
    """
    outcomes = _Outcomes(findings)
    options = ["-m", marker, "-q", "-p", "no:cacheprovider", "--rootdir", str(root), "-c", str(root / "pyproject.toml")]
    code = pytest.main([*options, str(root / selection)], plugins=[outcomes])
    findings.figure(Figure("GPU tests passed", outcomes.passed, "", "all", code == pytest.ExitCode.OK))
    if outcomes.failed:
        raise StageFailed(f"{len(outcomes.failed)} of {outcomes.passed + len(outcomes.failed)}: {outcomes.failed[0]}")
    if code != pytest.ExitCode.OK:
        raise StageFailed(f"pytest ended with {pytest.ExitCode(code).name} for {selection}")

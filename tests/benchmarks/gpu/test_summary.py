"""What `report.md` makes of what the stages found."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.gpu.findings import Figure, Findings, beside_expected, read_stage
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.summary import Outcome, Report, markdown


def test_what_is_far_from_the_expected_is_named_in_a_column_and_in_a_list(tmp_path: Path) -> None:
    findings = Findings(tmp_path, "kernels", until=time.monotonic())
    for name, value, expected in (("slow", 13.0, 10.0), ("fast", 7.0, 10.0), ("near", 12.0, 10.0), ("new", 1.0, None)):
        findings.figure(Figure(name, value, "ms", expected=expected))
    for op, seconds, judged in (("a", 0.06, True), ("b", 0.041, True), ("c", 0.4, False)):
        findings.row("ops", {"op": op, "seconds": seconds} | beside_expected(seconds, 0.04, judged=judged))
    outcome = Outcome("kernels", 1.0, "done", "")
    found = {"kernels": read_stage(tmp_path, "kernels")}
    lines = markdown(Report("", "", Machine("a device", "sm_90", "torch 0"), [outcome], found)).splitlines()
    start = lines.index("## More than 25 % from what was expected")
    listed = lines[start + 4 : lines.index("", start + 4)]
    assert listed == [
        "| kernels | slow | 13 ms | 10 | 1.3 |",
        "| kernels | fast | 7 ms | 10 | 0.7 |",
        "| kernels | a | 0.06 s | 0.04 | 1.5 |",
    ]
    assert "| kernels | near | 12 ms | 10 | 1.2 |  |" in lines
    assert "| kernels | slow | 13 ms | 10 | 1.3 | more |" in lines
    assert "| c | 0.4 | 0.04 | 10 |  |" in lines

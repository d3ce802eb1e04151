"""A stage that breaks, in whatever way, costs the report nothing but what it had not found yet."""

from __future__ import annotations

import csv
import errno
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report as report_module
from benchmarks.gpu.findings import Figure, Findings
from benchmarks.gpu.packing import FILES, refresh
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import end, exit_code, watch_signals
from tests.benchmarks.gpu import stage_tables as tables
from tests.benchmarks.gpu.stage_tables import report, stage


def stored(output: Path) -> dict[str, dict[str, Any]]:
    return {found["stage"]: found for found in json.loads((output / "report.json").read_text())["stages"]}


def eventually(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.05)
    return False


def alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("run", "seconds", "error"),
    [
        (tables.crash, 60.0, "ended with exit code 7"),
        (tables.abort, 60.0, "ended by signal SIGABRT"),
        (tables.hang, 5.0, "stopped after 5 s; what it had found is kept"),
        (tables.run_out_of_gpu_memory, 60.0, "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"),
        (tables.run_out_of_memory, 60.0, "MemoryError: "),
        (tables.find_something_wrong, 60.0, "it differs by 3"),
    ],
)
def test_the_others_results_are_there_when_a_stage_breaks(
    run: Callable[[Findings], None], seconds: float, error: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    stages = [stage("first", tables.good), stage("broken", run, seconds), stage("last", tables.good)]
    assert report(stages, output) == 1
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    found = stored(output)
    assert [found[name]["state"] for name in ("first", "broken", "last")] == ["done", "failed", "done"]
    assert found["broken"]["error"] == error
    assert [figure["name"] for figure in found["broken"]["figures"]] == ["found before"]
    assert found["first"]["figures"] == found["last"]["figures"] != []
    assert f"| broken | FAILED: {error.strip()}" in (output / "report.md").read_text()
    assert list(csv.reader((output / "kernels.csv").open())) == [["kernel", "p50"], ["a", "1"], ["a", "1"]]
    with tarfile.open(output / "logs.tgz") as archive:
        names = archive.getnames()
    assert sorted(names) == sorted(f"{name}.{kind}" for name in found for kind in ("json", "log"))
    printed = capfd.readouterr().out
    assert f"broken: FAILED: {error.strip()}" in printed
    # The table comes last.
    assert printed.rstrip().splitlines()[-1].startswith("└")


def test_all_went_well_is_exit_code_0(tmp_path: Path) -> None:
    assert report([stage("first", tables.good)], tmp_path) == 0


def test_an_output_folder_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^output_dir: cannot make"):
        report([stage("first", tables.good)], tmp_path / "file")


def test_what_a_stage_printed_and_its_traceback_are_in_its_log(tmp_path: Path) -> None:
    def run(findings: Findings) -> None:
        print("about to fail")
        os.system("echo from another process")
        raise ValueError("wrong")

    report([stage("broken", run)], tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "logs.tgz") as archive:
        log = archive.extractfile("broken.log")
        assert log is not None
        text = log.read().decode()
    assert "about to fail" in text
    assert "from another process" in text
    assert 'raise ValueError("wrong")' in text


def test_a_stage_is_ended_with_the_processes_it_started(tmp_path: Path) -> None:
    helpers = tmp_path / "helper.txt"

    def run(findings: Findings) -> None:
        helper = os.fork()
        if helper == 0:
            time.sleep(600)
        helpers.write_text(str(helper))
        time.sleep(600)

    assert report([stage("broken", run, 5.0)], tmp_path / "out") == 1
    assert eventually(lambda: not alive(int(helpers.read_text())))


def test_nothing_follows_an_essential_stage_that_failed(tmp_path: Path) -> None:
    stages = [stage("smoke", tables.find_something_wrong, essential=True), stage("last", tables.good)]
    assert report(stages, tmp_path) == 1
    found = stored(tmp_path)
    assert found["last"]["state"] == "left out"
    assert found["last"]["error"] == "not run: smoke failed"


def test_the_last_stage_gets_the_time_that_is_left_or_is_left_out(tmp_path: Path) -> None:
    def run(findings: Findings) -> None:
        findings.figure(Figure("seconds", findings.seconds_left))

    assert report([stage("rest", run, None)], tmp_path, total=30.0) == 0
    (figure,) = stored(tmp_path)["rest"]["figures"]
    assert 20.0 < figure["value"] < 28.0
    assert report([stage("rest", run, None)], tmp_path, total=6.0) == 0
    assert stored(tmp_path)["rest"]["error"] == "not run: the time was up"


def test_the_last_stage_has_not_failed_when_its_time_is_up(tmp_path: Path) -> None:
    assert report([stage("rest", tables.hang, None)], tmp_path, total=10.0) == 0
    found = stored(tmp_path)["rest"]
    assert (found["state"], found["error"]) == ("done", "stopped after 7 s; what it had found is kept")
    assert found["figures"] != []


def test_the_output_is_current_while_a_stage_runs_and_whole_when_the_report_is_killed(tmp_path: Path) -> None:
    process = tmp_path / "process.txt"

    def hang(findings: Findings) -> None:
        process.write_text(str(os.getpid()))
        tables.hang(findings)

    output = tmp_path / "out"
    stages = [stage("first", tables.good), stage("long", hang, 300.0)]
    running = multiprocessing.get_context("fork").Process(target=report, args=(stages, output), kwargs={"refresh": 0.2})
    running.start()

    def is_current() -> bool:
        return (output / "report.json").exists() and bool(stored(output).get("long", {}).get("figures"))

    assert eventually(is_current)
    assert running.pid is not None
    os.kill(running.pid, signal.SIGKILL)
    running.join()
    found = stored(output)
    assert found["first"]["state"] == "done"
    assert found["long"]["state"] == "running"
    assert "| long | running |" in (output / "report.md").read_text()
    with tarfile.open(output / "logs.tgz") as archive:
        assert "first.json" in archive.getnames()
    assert len(list(output.iterdir())) <= len(FILES) + 1
    # Nor does a stage outlive its report.
    assert eventually(lambda: not alive(int(process.read_text())))


def test_a_report_that_is_terminated_writes_what_it_has_and_ends_with_143(tmp_path: Path) -> None:
    process = tmp_path / "process.txt"

    def hang(findings: Findings) -> None:
        findings.figure(Figure("found before", 1.0))
        process.write_text(str(os.getpid()))
        time.sleep(600)

    output = tmp_path / "out"
    stages = [stage("first", tables.good), stage("long", hang, 300.0)]

    def run() -> None:
        end(exit_code(lambda: report(stages, output)))

    running = multiprocessing.get_context("fork").Process(target=run)
    running.start()
    assert eventually(lambda: process.exists() and process.read_text() != "")
    assert running.pid is not None
    os.kill(running.pid, signal.SIGTERM)
    running.join(30.0)
    assert running.exitcode == 143
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)
    found = stored(output)
    assert found["long"]["state"] == "running"
    assert [figure["name"] for figure in found["long"]["figures"]] == ["found before"]
    assert eventually(lambda: not alive(int(process.read_text())))


def test_the_handler_of_a_report_is_not_its_stages(tmp_path: Path) -> None:
    def run(findings: Findings) -> None:
        findings.figure(Figure("is default", float(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)))

    watch_signals()
    report([stage("first", run)], tmp_path)
    assert stored(tmp_path)["first"]["figures"][0]["value"] == 1.0


def test_two_reports_into_one_folder_do_not_take_each_others_files(tmp_path: Path) -> None:
    contexts = multiprocessing.get_context("fork")
    folders = [tmp_path / "a", tmp_path / "b"]
    output = tmp_path / "out"
    for folder in (*folders, output):
        folder.mkdir()

    def write(folder: Path) -> None:
        for _ in range(200):
            refresh(folder, output, {}, "report")

    writing = [contexts.Process(target=write, args=(folder,)) for folder in folders]
    for process in writing:
        process.start()
    for process in writing:
        process.join()
    assert [process.exitcode for process in writing] == [0, 0]
    assert sorted(path.name for path in output.iterdir()) == sorted(FILES)


def test_an_output_that_cannot_be_written_for_a_while_costs_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = iter([True])

    def full(*arguments: Any) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        refresh(*arguments)

    monkeypatch.setattr(report_module, "refresh", full)
    assert report([stage("first", tables.good), stage("last", tables.good)], tmp_path) == 0
    assert [found["state"] for found in stored(tmp_path).values()] == ["done", "done"]
    lines = capfd.readouterr().out.splitlines()
    assert len([line for line in lines if f"cannot write {tmp_path}: No space left on device" in line]) == 1


def test_an_output_that_cannot_be_written_at_last_is_one_line_that_names_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report_module, "refresh", full)
    with pytest.raises(InputError, match=r"No space left on device; what was found is in ") as caught:
        report([stage("first", tables.good)], tmp_path)
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert (kept / "first.json").exists()
    shutil.rmtree(kept)


def test_a_long_stage_is_told_about_while_it_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(findings: Findings) -> None:
        findings.figure(Figure("early", 1.0))
        findings.leave_out("the rest")
        time.sleep(1.5)

    report([stage("long", run)], tmp_path, notice="not real | ")
    lines = capfd.readouterr().out.splitlines()
    told = [float(line.partition("[")[2].partition("s]")[0]) for line in lines if "long: " in line]
    early, late = (next(line for line in lines if text in line) for text in ("early: 1", "long: done"))
    assert lines.index(early) < lines.index(late)
    assert told == sorted(told)
    assert any("long: no time for the rest" in line for line in lines)
    assert all(line.startswith("not real | ") for line in lines)
    assert "**not real.**" in (tmp_path / "report.md").read_text()

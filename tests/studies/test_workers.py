"""Worker processes: what happens when one of them, or the one that started them, is killed."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedra_engine.runtime.errors import ProcessLostError
from fedra_engine.studies.compare import execute_all
from fedra_engine.studies.workers import work_off
from tests.studies.light_work import pid_or_error
from tests.studies.planned import planned_run

pytestmark = pytest.mark.slow

KILLED_WITH_A_WORKER = """
import os, threading, time
from fedra_engine.studies.workers import work_off

def work(item):
    if item == 0:
        return os.getpid()
    time.sleep(1000)

def report(pid):
    print(pid, flush=True)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    work_off([0, 1], 2, work, report)
"""


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    def kill_one() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill_one, daemon=True).start()
    with pytest.raises(ProcessLostError, match="jobs: a process that executed runs was killed"):
        execute_all([planned_run(tmp_path), planned_run(tmp_path, "fedit")], 2, lambda outcome: None)
    assert not multiprocessing.active_children()


def test_workers_share_the_items_and_end() -> None:
    found: list[int] = []
    work_off(range(7), 2, pid_or_error, found.append)
    assert len(found) == 7
    assert len({*found, os.getpid()}) == 3
    assert not multiprocessing.active_children()


def test_an_error_of_a_worker_is_raised_where_the_work_was_asked_for() -> None:
    with pytest.raises(AssertionError, match="a fault") as raised:
        work_off([-2, -2], 2, pid_or_error, print)
    assert "in pid_or_error" in raised.value.__notes__[0]
    with pytest.raises(ConnectionResetError, match="no connection of the workers"):
        work_off([-1, -1], 2, pid_or_error, print)
    assert not multiprocessing.active_children()


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED_WITH_A_WORKER)
    # Returns when the worker, which has the same output, has ended, too.
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -9
    assert ended.stdout.strip().isdecimal()

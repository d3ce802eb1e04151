"""Worker processes: what happens when one of them, or the one that started them, is killed."""

import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedra_engine.comparison.workers import execute_all
from fedra_engine.runtime.errors import ProcessLostError
from tests.comparison.planned import planned_run

KILLED_WITH_A_WORKER = """
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor
from fedra_engine.comparison.workers import _start_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
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


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED_WITH_A_WORKER)
    # Returns when the worker, which has the same output, has ended, too.
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -9
    assert ended.stdout.strip().isdecimal()

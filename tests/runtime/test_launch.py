"""Jobs of processes that do next to nothing: how they find one another, and how all of them end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedra_engine.runtime import launch
from fedra_engine.runtime.launch import JobEnd, run_job

SLEEP = "import time; time.sleep(60)"
SOON = 20
"""Seconds within which everything here ends, on a busy machine."""


def job(program: str, processes: int = 2, **more: str) -> JobEnd:
    """Run `program`, in which `rank` is the number of the process."""
    return run_job([sys.executable, "-c", f"import os; rank = os.environ.get('RANK'); {program}"], processes, **more)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def test_the_processes_get_what_they_need_to_find_one_another(tmp_path: Path) -> None:
    program = "import json; json.dump(dict(os.environ), open(rank or 'alone', 'w'))"
    command = f"os.chdir({str(tmp_path)!r}); {program}"
    assert job(command, environment={"MORE": "x"}).exit_code == job(command, 1).exit_code == 0
    found = [json.loads((tmp_path / str(index)).read_text()) for index in range(2)]
    for index, variables in enumerate(found):
        assert variables["RANK"] == variables["LOCAL_RANK"] == str(index)
        assert variables["WORLD_SIZE"] == variables["LOCAL_WORLD_SIZE"] == "2"
        assert variables["MORE"] == "x"
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
    assert "RANK" not in json.loads((tmp_path / "alone").read_text())


def test_a_failure_of_the_main_process_ends_the_job() -> None:
    started = time.monotonic()
    end = job(f"rank == '0' and os._exit(2); {SLEEP}")
    assert (end, end.exit_code) == (JobEnd(0, 2, True), 2)
    assert time.monotonic() - started < SOON


def test_after_another_one_has_died_the_main_process_has_time_to_say_so(tmp_path: Path) -> None:
    dies = "import time; rank == '1' and os.kill(os.getpid(), 9)"
    says = f"time.sleep(1); open({str(tmp_path / 'said')!r}, 'w'); os._exit(1)"
    assert job(f"{dies}; {says}") == JobEnd(0, 1, True)
    assert (tmp_path / "said").exists()


@pytest.mark.parametrize(
    ("ignored", "end"),
    [
        ("signal.SIGUSR1", JobEnd(1, 2, False)),
        # It is killed in the end.
        ("signal.SIGTERM", JobEnd(1, 2, False)),
    ],
)
def test_a_main_process_that_notices_nothing_is_ended(
    ignored: str, end: JobEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_SECONDS_TO_NOTICE", 0.5)
    monkeypatch.setattr(launch, "_SECONDS_TO_CLOSE", 0.5)
    program = f"import signal; signal.signal({ignored}, signal.SIG_IGN); rank == '1' and os._exit(2)"
    assert job(f"{program}; {SLEEP}") == end
    assert end.reason == "process 1 ended with exit code 2"


def test_a_main_process_that_is_killed_has_said_nothing() -> None:
    end = job(f"rank == '0' and os.kill(os.getpid(), 9); {SLEEP}")
    assert (end, end.exit_code) == (JobEnd(0, -9, False), 1)
    assert end.reason == "process 0 was killed by SIGKILL"


WATCHED = """
import sys

from fedra_engine.runtime import exit_codes
from fedra_engine.runtime.launch import run_job

CHILD = '''
import os, signal, time

def arrived(number, frame):
    os.write(1, f"{os.environ['RANK']} got {number}{os.linesep}".encode())
    time.sleep(0.3)
    os._exit(128 + number)

signal.signal(signal.SIGINT, arrived)
signal.signal(signal.SIGTERM, arrived)
os.write(1, f"pid {os.getpid()}{os.linesep}".encode())
time.sleep(60)
'''
exit_codes.watch_signals()
sys.exit(run_job([sys.executable, "-c", CHILD], 2).exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_every_process_once_and_leaves_none(number: signal.Signals) -> None:
    """Also that of a terminal, which goes to the whole group of processes; and after a kill, none is left either."""
    command = [sys.executable, "-c", WATCHED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as starter:
        assert starter.stdout is not None
        pids = [int(starter.stdout.readline().split()[1]) for _ in range(2)]
        os.killpg(starter.pid, number)
        said, _ = starter.communicate(timeout=SOON)
    if number == signal.SIGKILL:
        assert (starter.returncode, said) == (-9, "")
    else:
        assert starter.returncode == 128 + number
        assert sorted(said.splitlines()) == [f"{index} got {int(number)}" for index in range(2)]
    until = time.monotonic() + SOON
    while any(map(running, pids)):
        assert time.monotonic() < until
        time.sleep(0.05)

"""`fedra simulate --processes 2`, as a user starts it on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import LAUNCHER, TIME_LIMIT, finish, run_job, start

pytestmark = pytest.mark.slow

SMALL = ["--data.domains=[clean,noisy]", "--data.clients_per_domain=2", "--clients.capacities=[4,2]"]
ENDLESS = [*SMALL, "--rounds=100000", "--evaluate_every=100000"]
SOON = 20
"""Seconds within which a job ends; on an idle machine it is a fraction of one."""


def simulate(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedra_engine", "simulate", "--processes=2", "--output_dir", str(folder)]
    return start([*command, *arguments])


def state(run: Path, round: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"round_{round:04d}" / "state.safetensors")


def test_it_gives_the_bits_of_torchrun_also_when_resumed(tmp_path: Path) -> None:
    options = [*SMALL, "--execution.deterministic=true", "--execution.lanes=2", "--training.lr_schedule=constant"]
    code, output, error = finish(simulate(tmp_path, *options, "--name=own", "--rounds=1"))
    assert (code, error) == (0, "")
    assert output.startswith("2 processes of ")
    assert output.count("\nprocesses  2\n") == output.count("\ntuned  ") == 1
    resumed = [sys.executable, str(LAUNCHER), "--resume", str(tmp_path / "own"), "--rounds=2", "--processes", "2"]
    assert finish(start(resumed))[0] == 0
    assert run_job(LAUNCHER, [*options, "--output_dir", str(tmp_path), "--name=torchrun", "--rounds=2"])[0] == 0
    found, expected = (state(tmp_path / name, 1) for name in ("own", "torchrun"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bad_input_is_one_line_and_code_2(tmp_path: Path) -> None:
    found = finish(simulate(tmp_path, *SMALL, "--clients.sampling=uniform", "--clients.participants=1"))
    assert found[0] == 2
    assert found[2] == (
        "error: processes: found 2, expected at most the 1 participants of a round, which the processes divide among "
        "themselves\n"
    )
    assert not list(tmp_path.iterdir())


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def children(job: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


LOST = "error: another process of the job died, or did not answer within "


@pytest.mark.parametrize(
    ("victim", "number", "code", "said"),
    [
        ("all", signal.SIGINT, 130, "interrupted; fedra simulate --resume "),
        ("launcher", signal.SIGTERM, 143, "error: the launcher ended the job, as it does when it is terminated"),
        ("launcher", signal.SIGKILL, -9, ""),
        ("main", signal.SIGKILL, 1, "error: process 0 was killed by SIGKILL; the rounds in checkpoints/ are kept"),
        ("other", signal.SIGKILL, 1, LOST),
    ],
)
def test_however_it_ends_one_line_says_so_and_no_process_is_left(
    victim: str, number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    job = simulate(tmp_path, *ENDLESS, "--name=run", "--quiet")
    wait_until((tmp_path / "run" / "checkpoints" / "round_0001").exists, TIME_LIMIT)
    main, other = pids = sorted(children(job))
    if victim == "all":
        # As a terminal does it.
        os.killpg(job.pid, number)
    else:
        os.kill({"launcher": job.pid, "main": main, "other": other}[victim], number)
    wait_until(lambda: job.poll() is not None, SOON)
    wait_until(lambda: not any(map(running, pids)), SOON)
    found, _, error = finish(job)
    assert found == code
    lines = [line for line in error.splitlines() if not line.startswith("interrupted, closing files")]
    assert [line[: len(said)] for line in lines] == ([said] if said else [])


def test_a_process_that_dies_before_it_has_joined_ends_the_job(tmp_path: Path) -> None:
    job = simulate(tmp_path, *ENDLESS, "--quiet")
    wait_until(lambda: len(children(job)) == 2, SOON)
    pids = sorted(children(job))
    os.kill(pids[1], signal.SIGKILL)
    code, _, error = finish(job)
    assert (code, error.count("error: ")) == (1, 1)
    assert not any(map(running, pids))

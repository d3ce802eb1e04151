"""Start jobs of several processes as a user does, on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launchers" / "simulate.py"
TIME_LIMIT = 240
"""Seconds; most jobs take ten. One that hangs must not stop the tests."""


def run_job(script: Path, arguments: Sequence[str], *, processes: int = 2) -> tuple[int, str, str]:
    """Let torchrun run `script` in so many processes; see `finish`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return finish(start([*launch, str(script), *arguments]))


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start `command`, one thread for each process, in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a job to end by itself. Returns its exit code and what it wrote to stdout and stderr."""
    try:
        output, error = job.communicate(timeout=TIME_LIMIT)
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)
        raise
    return job.returncode, output, error


def engine_errors(error: str) -> list[str]:
    """The lines on stderr that are the engine's own; torchrun adds its report of a job that failed."""
    return [line for line in error.splitlines() if "error: " in line and "torch/distributed" not in line]

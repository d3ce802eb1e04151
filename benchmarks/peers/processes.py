"""The contestants' processes, as the race sees them."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, python_of
from benchmarks.peers.job import Job
from fedra_engine.runtime.errors import ProcessLostError

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray lets other work go first, which the others do not.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class ContestantError(ProcessLostError):
    """A contestant's process has ended, or its work is another than that of the others."""


@dataclass(frozen=True)
class Times:
    """CPU and wall-clock seconds of a round."""

    cpu: float
    wall: float


class Contestant:
    """A process that runs one job after another."""

    def __init__(self, name: str, module: str, environment: str, folder: Path) -> None:
        """Start a `module` of contestants in an `environment`; what it prints goes to a file in `folder`."""
        self.name = name
        self._started = False
        self._log = folder / f"{name}.log"
        variables = os.environ | _QUIET
        # Of whatever the process starts; its own threads are those of its job.
        variables["OMP_NUM_THREADS"] = "1"
        # Threads that spin while they wait would count as work.
        variables["OMP_WAIT_POLICY"] = "PASSIVE"
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        variables["FLWR_HOME"] = str(folder / "flwr")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python_of(environment)), "-m", "benchmarks.peers.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
                cwd=folder,
            )

    def wait_until_started(self) -> None:
        """Return once it has imported its libraries."""
        if not self._started:
            self._started = bool(self._answer())

    def begin(self, job: Job) -> None:
        """Load what a job needs."""
        self._ask({"job": asdict(job)})

    def end(self) -> None:
        """Forget the job."""
        self._ask({"end": True})

    def round(self, result: Path | None = None) -> Times:
        """Run a round, and save the state after it to the file `result`."""
        return Times(**self._ask({"round": None if result is None else str(result)}))

    def close(self) -> None:
        """End the process, if it does not end of itself."""
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        # A process that has ended does not answer, which says more.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
            raise ContestantError(
                f"{self.name}: found its process ended, expected an answer; it last printed: {lines[-1]}"
            )
        found: dict[str, Any] = json.loads(answer)
        return found

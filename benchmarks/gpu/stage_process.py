"""A stage of the GPU report as a process of its own.

A kernel that reads out of bounds takes the whole process's GPU state with it; so one stage cannot harm the next.
The processes are forked from one that has imported the libraries, which takes ten seconds, but has never used the GPU.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.findings import Findings, StageFailed, read_stage
from fedra_engine.runtime.exit_codes import die_with_parent

STAGES = ("smoke", "compile", "kernels", "end_to_end", "tests", "checks", "scaling", "rest")
"""In the order they run; the last one gets the time that the others leave."""


@dataclass(frozen=True)
class Stage:
    """A part of the report.

    Attributes:
        seconds: after which its process is stopped, its start included; None: what the other stages leave.
        run: does the work and adds what it finds; raises what went wrong.
        essential: where it fails, the report ends.
    """

    name: str
    seconds: float | None
    run: Callable[[Findings], None]
    essential: bool = False


class StageProcess:
    """A running stage; its output goes to `<folder>/<stage>.log`."""

    def __init__(self, stage: Stage, folder: Path, seconds: float) -> None:
        self._stage, self._folder = stage, folder
        self.started = time.monotonic()
        self.until = self.started + seconds
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(stage, folder, self.until), name=stage.name
        )
        sys.stdout.flush()
        sys.stderr.flush()
        self._process.start()

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def wait(self, seconds: float) -> bool:
        """Wait until the stage has ended, at most `seconds`. Returns whether it has."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def kill(self) -> None:
        """End the stage and every process that it started."""
        # Its process group exists once it has a session of its own, and as long as any process of it lives.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def error(self) -> str:
        """Why the stage, which has ended, failed, in one line; empty where it went well."""
        # Helpers of a stage that broke off go with it.
        self.kill()
        said, code = str(read_stage(self._folder, self._stage.name)["error"]), self._process.exitcode
        if said or code == 0:
            return said
        if code is not None and code < 0:
            return f"ended by signal {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    @property
    def _pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid


def _run(stage: Stage, folder: Path, until: float) -> None:
    os.setsid()
    die_with_parent()
    # The report's own handlers are not a stage's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(folder / f"{stage.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(log), "w", buffering=1) for _ in range(2))
    faulthandler.enable(file=sys.stderr)
    findings = Findings(folder, stage.name, until=until)
    try:
        stage.run(findings)
    except StageFailed as error:
        findings.fail(str(error))
        sys.exit(1)
    except BaseException as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        findings.fail(f"{type(error).__name__}: {text[:300]}")
        sys.exit(1)

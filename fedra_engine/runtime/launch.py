"""Start the processes of a job on this machine, and see it to its end. Imports no torch, which takes seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, NamedTuple

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import (
    BROKEN_OFF,
    MAIN_SPEAKS_FIRST,
    Interrupted,
    die_with_parent,
    unwound_by_signals,
)

_SECONDS_TO_NOTICE = MAIN_SPEAKS_FIRST + 1
"""How long the main process may take to report that another one has ended, before it is told to end."""
_SECONDS_TO_CLOSE = 30
"""How long the main process may take to close its files, before it is killed."""
_SECONDS_TO_END = 2
"""The same for the others, which keep nothing open."""
_SECONDS_BETWEEN_LOOKS = 0.05


class JobEnd(NamedTuple):
    """How a job ended.

    Attributes:
        process: number of the process that ended it, from 0.
        code: that process's exit code; negative, with the number of the signal, if it was killed.
        reported: whether the main process failed by itself, which it has then said.
        interrupt: the signal that this process was sent and passed on to the job, if any.
    """

    process: int
    code: int
    reported: bool
    interrupt: Interrupted | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of a command that has run the job."""
        if self.interrupt is not None:
            return 128 + self.interrupt.number
        return self.code if self.code >= 0 else BROKEN_OFF

    @property
    def reason(self) -> str:
        """What a message says of the process: `process 1 was killed by SIGKILL`."""
        if self.code >= 0:
            return f"process {self.process} ended with exit code {self.code}"
        return f"process {self.process} was killed by {signal.Signals(-self.code).name}"


def check_busy(processes: int, participants: int) -> None:
    """Raise InputError if a round has too few participants for every process to train one."""
    if processes > participants:
        raise InputError(
            f"processes: found {processes}, expected at most the {participants} participants of a round, which the "
            "processes divide among themselves"
        )


def run_job(
    command: Sequence[str],
    processes: int,
    *,
    environment: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
) -> JobEnd:
    """Run `command` as the `processes` of one job and wait for their end; none of them outlives this process.

    A signal to this process is passed on to all of them, once. If one fails, the others are ended, the main one after
    it has had time to say what happened.

    Args:
        command: the program and its arguments; a single process runs it as it is, without a job.
        environment: variables for the processes, beside those of this one.
        output: a file for what they print; the stdout and stderr of this process if not given.
    """
    started = list[subprocess.Popen[str]]()
    interrupt: Interrupted | None = None
    failed: int | None = None
    try:
        with unwound_by_signals():
            shared = {**os.environ, **(environment or {}), **_job_variables(processes)}
            for index in range(processes):
                started.append(_start(command, index, processes, shared, output))
            failed = _first_failure(started)
            _wait(started[:1], _SECONDS_TO_NOTICE)
    except Interrupted as arrived:
        interrupt = arrived
        for process in started:
            process.send_signal(arrived.number)
        _wait(started[:1], _SECONDS_TO_CLOSE)
    finally:
        by_itself = bool(started) and started[0].poll() is not None
        _end(started[:1], _SECONDS_TO_CLOSE)
        _end(started[1:], _SECONDS_TO_END)
    code = started[0].returncode if started else 0
    if failed is None or (by_itself and code):
        return JobEnd(0, code, code > 0, interrupt)
    return JobEnd(failed, started[failed].returncode, code > 0)


def _job_variables(processes: int) -> dict[str, str]:
    """The variables by which the processes of a job find one another, as torchrun sets them."""
    if processes == 1:
        return {}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    count = str(processes)
    return {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _start(
    command: Sequence[str], index: int, processes: int, environment: Mapping[str, str], output: IO[str] | None
) -> subprocess.Popen[str]:
    own = {"RANK": str(index), "LOCAL_RANK": str(index)} if processes > 1 else {}
    return subprocess.Popen(
        command,
        env={**environment, **own},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        text=True,
        # The terminal's interrupts would reach a process of this session twice: from the terminal and from here.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _first_failure(started: Sequence[subprocess.Popen[str]]) -> int | None:
    """Wait until a process fails, and return its number; None once all have ended well."""
    running = dict(enumerate(started))
    while running:
        for index, process in list(running.items()):
            if process.poll() is not None:
                if process.returncode:
                    return index
                del running[index]
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return None


def _wait(processes: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Wait for the end of all `processes`, for so many seconds together."""
    until = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0))


def _end(processes: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Tell `processes` to end, and kill those that have not after so many seconds."""
    for process in processes:
        process.terminate()
    _wait(processes, seconds)
    for process in processes:
        process.kill()
        process.wait()

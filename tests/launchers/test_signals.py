"""A launcher that is interrupted or terminated says so in one line, leaves nothing running, and can go on."""

from __future__ import annotations

import os
import pty
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import fedra_engine.commands.dry_run

# What forks of this process need not import.
import fedra_engine.studies.compare
import fedra_engine.studies.scale  # noqa: F401
from fedra_engine.callbacks.saved_rounds import load_newest_intact
from tests.launchers.conftest import LAUNCHERS

pytestmark = pytest.mark.slow

SIGNALS = [signal.SIGINT, signal.SIGTERM]
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
SECONDS = 60
"""After which a test gives up."""
SOON = 10
"""Seconds within which a launcher ends; on an idle machine it is a fraction of one."""
TINY = ["--data.domains=[clean]", "--data.clients_per_domain=2", "--clients.capacities=[2]", "--rounds=100000"]
TRIP = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
EXITS, ERRORS = "fedra_engine.runtime.exit_codes", "fedra_engine.runtime.errors"
LIGHT = {"fedra_engine", "fedra_engine.runtime", EXITS, ERRORS}

class Trip:
    def find_spec(self, name, path=None, target=None):
        if EXITS in sys.modules and name.partition(".")[0] not in sys.stdlib_module_names - LIGHT:
            if name not in LIGHT:
                sys.meta_path.remove(self)
                os.kill(os.getpid(), int(os.environ["TRIP"]))

sys.meta_path.insert(0, Trip())
"""
"""A `sitecustomize` that sends a signal at the first import that takes time."""


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: WORDS[number])
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS.glob("*.py")), ids=lambda path: path.stem)
def test_a_signal_during_the_imports_is_one_line(launcher: Path, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TRIP)
    root = LAUNCHERS.parent
    path = os.pathsep.join(map(str, [tmp_path, root, root / "kernels"]))
    done = subprocess.run(
        [sys.executable, str(launcher), "--help"],
        env={**os.environ, "PYTHONPATH": path, "TRIP": str(int(number))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (128 + number, f"{WORDS[number]}\n")


class Forked:
    """A launcher in a fork of this process, which has imported everything, and in a session of its own."""

    def __init__(self, folder: Path, name: str, *arguments: str, stdout: int | None = None) -> None:
        self._errors = folder / "errors"
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                os.chdir(folder)
                errors = os.open(self._errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(os.open(os.devnull, os.O_WRONLY) if stdout is None else stdout, 1)
                os.dup2(errors, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                signal.signal(signal.SIGINT, signal.default_int_handler)
                launcher = str(LAUNCHERS / f"{name}.py")
                sys.argv = [launcher, *arguments]
                runpy.run_path(launcher, run_name="__main__")
            except SystemExit as exited:
                os._exit(int(exited.code or 0))
            finally:
                os._exit(99)

    def wait(self, seconds: float) -> int:
        """The exit code; the process must end by itself in so many seconds."""
        status: list[int] = []

        def ended() -> bool:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            status.append(code)
            return pid != 0

        wait_until(ended, seconds)
        return os.waitstatus_to_exitcode(status[-1])

    def errors(self) -> str:
        return self._errors.read_text()

    def children(self) -> list[int]:
        with suppress(FileNotFoundError):
            text = " ".join(file.read_text() for file in Path(f"/proc/{self.pid}/task").glob("*/children"))
            return [int(pid) for pid in text.split()]
        return []

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Fails when it takes longer."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def running(pid: int) -> bool:
    """Whether the process has neither ended nor is waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[..., Forked]]:
    """A function that starts a launcher in `tmp_path`."""
    started: list[Forked] = []

    def start(name: str, *arguments: str, stdout: int | None = None) -> Forked:
        started.append(Forked(tmp_path, name, *arguments, stdout=stdout))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize(
    ("terminal", "number"),
    [(False, signal.SIGTERM), (True, signal.SIGTERM), (True, signal.SIGINT)],
    ids=["terminated", "terminated_with_a_live_display", "interrupted_with_a_live_display"],
)
def test_a_run_ends_soon_and_says_how_to_go_on(
    terminal: bool, number: signal.Signals, tmp_path: Path, fork: Callable[..., Forked]
) -> None:
    ours, theirs = pty.openpty()
    process = fork("simulate", *TINY, "--output_dir=.", "--name=the run", stdout=theirs if terminal else None)
    os.close(theirs)
    os.set_blocking(ours, False)
    shown = b""

    def trained() -> bool:
        nonlocal shown
        # Somebody has to read what a terminal shows.
        with suppress(BlockingIOError, OSError):
            shown += os.read(ours, 2**16)
        return (tmp_path / "the run" / "checkpoints" / "round_0001").exists()

    wait_until(trained)
    os.kill(process.pid, number)
    assert process.wait(SOON) == 128 + number
    assert process.errors() == f"{WORDS[number]}; fedra simulate --resume 'the run' resumes it\n"
    assert f"  stopped: {WORDS[number]}\n" in (tmp_path / "the run" / "run.log").read_text()
    with suppress(OSError):
        while part := os.read(ours, 2**16):
            shown += part
    os.close(ours)
    assert (b"\x1b[?25l" in shown) == terminal
    assert shown.rfind(b"\x1b[?25h") >= shown.rfind(b"\x1b[?25l")
    assert load_newest_intact(tmp_path / "the run") is not None
    assert not list((tmp_path / "the run").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("launcher", "by_terminal", "options"),
    [
        ("compare", True, ["--methods=fedra", "--seeds=0,1", "--jobs=2", *TINY]),
        ("compare", False, ["--methods=fedra", "--seeds=0,1", "--jobs=2", *TINY]),
        ("scaling", True, ["--clients=4", "--processes=1"]),
        ("scaling", False, ["--clients=4", "--processes=2"]),
    ],
)
def test_no_process_is_left(launcher: str, by_terminal: bool, options: list[str], fork: Callable[..., Forked]) -> None:
    process = fork(launcher, *options, "--output_dir=runs")
    # Two that train; a third, which looks after what they share, may have been there before.
    wait_until(lambda: len(process.children()) >= (2 if launcher == "compare" else 1))
    # In the midst of the children's imports.
    time.sleep(0.5)
    children = process.children()
    if by_terminal:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, signal.SIGTERM)
    assert process.wait(2 * SOON) == (130 if by_terminal else 143)
    said = "interrupted" if by_terminal else "terminated"
    at_once = "interrupted, closing files … (Ctrl-C again ends at once)\n" if by_terminal else ""
    assert process.errors() == f"{at_once}{said}; the same command resumes it\n"
    wait_until(lambda: not any(map(running, children)), SOON)


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("compare", ["--methods=fedra", "--seeds=0,1", "--jobs=2", *TINY]),
        ("scaling", ["--clients=4", "--processes=1", "--seconds=100"]),
        ("scaling", ["--clients=4", "--processes=2", "--seconds=100"]),
    ],
)
def test_no_process_outlives_a_killed_one(launcher: str, options: list[str], fork: Callable[..., Forked]) -> None:
    process = fork(launcher, *options, "--output_dir=runs")
    # As above.
    wait_until(lambda: len(process.children()) >= (2 if launcher == "compare" else 1))
    # In the midst of the children's imports.
    time.sleep(0.5)
    children = process.children()
    process.kill()
    wait_until(lambda: not any(map(running, children)), SOON)

"""How launchers end."""

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.exit_codes import (
    BAD_INPUT,
    BROKEN_OFF,
    closing_notice_to,
    end,
    exit_code,
    unwound_by_signals,
)


def test_bad_input_is_one_line_on_stderr_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise InputError("data.root: found\n  nothing")

    assert exit_code(main) == BAD_INPUT == 2
    captured = capsys.readouterr()
    assert captured.err == "error: data.root: found nothing\n"
    assert captured.out == ""


def test_no_name_in_a_message_or_warning_steers_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def main() -> None:
        logging.getLogger("fedra_engine.data").warning("left out %s", "a\x1b[2J")
        raise InputError("data.root: found \x1b[31m\udcff")

    assert exit_code(main) == BAD_INPUT
    assert capsys.readouterr().err == "left out a\\x1b[2J\nerror: data.root: found \\x1b[31m\\udcff\n"


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    assert exit_code(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_closes_what_is_open_and_a_second_one_does_not_wait(
    times: int, number: signal.Signals, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        with unwound_by_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                print("closed", flush=True)
                if times == 2:
                    os.kill(os.getpid(), number)
                    print("waited", flush=True)

    assert in_fork(main) == 128 + number
    at_once = "interrupted, closing files … (Ctrl-C again ends at once)\n" if word == "interrupted" else ""
    assert capfd.readouterr() == ("closed\n", f"{at_once}{word}\n")


def test_a_live_display_shows_itself_that_files_are_being_closed(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        with unwound_by_signals(), closing_notice_to(lambda text: print(f"[{text[:11]}]", flush=True)):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                print("closed", flush=True)

    assert in_fork(main) == 130
    assert capfd.readouterr() == ("[interrupted]\nclosed\n", "interrupted\n")


def test_a_signal_ends_at_once_where_nothing_is_open(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            with unwound_by_signals():
                pass
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            print("went on", flush=True)

    assert in_fork(main) == 143
    assert capfd.readouterr() == ("", "terminated\n")


def test_a_forked_process_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        pid = os.fork()
        if pid == 0:
            with unwound_by_signals():
                os.kill(os.getpid(), signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143

    assert in_fork(main) == 0
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    def main() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    assert in_fork(main, prepare) == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/metrics.jsonl"),
            "error: runs/a/metrics.jsonl: found no space left on device, expected room for it on its disk; go on\n",
        ),
        (
            OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/a/config.yaml"),
            "error: runs/a/config.yaml: found read-only file system, expected a disk that can be written; go on\n",
        ),
        (
            BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
            "error: output: found broken pipe, expected a place that can be read and written; go on\n",
        ),
        (
            OSError("only\nwords"),
            "error: output: found only words, expected a place that can be read and written; go on\n",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line_and_code_1(
    error: OSError, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error.add_note("the innermost note is left out")
    error.add_note("go on")

    def main() -> None:
        raise error

    assert exit_code(main) == BROKEN_OFF == 1
    assert capsys.readouterr().err == line


def test_a_full_disk_behind_stdout_is_one_line_and_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    assert in_fork(lambda: print("lost"), prepare) == 1
    assert capfd.readouterr().err == (
        "error: output: found no space left on device, expected room for it on its disk\n"
    )


def test_a_reader_that_has_enough_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    def prepare() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    assert in_fork(lambda: print("lost"), prepare) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("main", ["lambda: None", "lambda: os.kill(os.getpid(), 15)"], ids=["done", "terminated"])
def test_a_closed_stdout_is_nobodys_business(main: str) -> None:
    script = f"import os; from fedra_engine.runtime.exit_codes import end, exit_code; end(exit_code({main}))"
    ended = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, script], capture_output=True, text=True, check=False
    )
    expected = (0, "") if main == "lambda: None" else (143, "terminated\n")
    assert (ended.returncode, ended.stderr) == expected


def in_fork(main: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> int:
    """The code with which a process ends that runs `main` as a launcher does, after `prepare`."""
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            end(exit_code(main))
        except SystemExit as exited:
            os._exit(int(exited.code or 0))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


ALONE = ""
IN_A_JOB = (
    "import torch; torch.distributed.init_process_group('gloo', init_method='file://{0}/job', rank=0, world_size=1)"
)


@pytest.mark.parametrize("start", [ALONE, IN_A_JOB], ids=["alone", "in_a_job"])
def test_an_ending_process_has_said_and_done_all(start: str, tmp_path: Path) -> None:
    lines = [
        start.format(tmp_path),
        "import atexit",
        "from fedra_engine.runtime.exit_codes import end",
        "atexit.register(print, 'done')",
        "print('said')",
        "end(2)",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "said\ndone\n"), ended.stderr

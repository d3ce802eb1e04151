"""The end of a launcher: one line and an exit code, never a traceback, in any number of processes.

This module imports nothing but this package's errors: a launcher imports it first, to handle signals while it imports
the rest.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from fedra_engine.runtime.errors import InputError, PrintableFormatter, ProcessLostError, one_line, printable

BROKEN_OFF = 1
"""The machine failed; the same command may succeed later."""
BAD_INPUT = 2
MAIN_SPEAKS_FIRST = 5.0
"""Seconds that other processes wait before they print. Once the main process has ended, `torchrun` ends them."""
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Messages by signal; the exit code is 128 plus the signal's number."""
_CLOSING = "interrupted, closing files … (Ctrl-C again ends at once)"
"""What is said at the first Ctrl-C, as closing may take a while."""
_TELL_PARENT_DIED = 1
"""Linux's PR_SET_PDEATHSIG."""
_SHOW_CURSOR = b"\x1b[?25h"
"""Undoes what a live display does."""
_EXPECTED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "expected room for it on its disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "expected a place that this user may use"),
    errno.EROFS: "expected a disk that can be written",
}


class Interrupted(KeyboardInterrupt):
    """A signal of `_SIGNALS` arrived."""

    def __init__(self, number: int) -> None:
        super().__init__(_SIGNALS[signal.Signals(number)])
        self.number = number


class _Watch:
    """State of the signal handler: its process, open `unwound_by_signals` blocks, and whether they are being left.

    `show` takes what is said at the first Ctrl-C, where there is a live display.
    """

    process: int | None = None
    open = 0
    unwinding = False
    show: Callable[[str], None] | None = None


def watch_signals() -> None:
    """Handle signals from now on: they end the process at once, within `unwound_by_signals` only the second one."""
    _Watch.process, _Watch.open, _Watch.unwinding = os.getpid(), 0, False
    for number in _SIGNALS:
        # A shell starts background commands with interrupts ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Let the first signal inside raise `Interrupted`, so that open resources are closed."""
    _Watch.open += 1
    try:
        yield
    finally:
        _Watch.open -= 1


@contextmanager
def closing_notice_to(show: Callable[[str], None]) -> Iterator[None]:
    """Give what is said at the first Ctrl-C to `show`, as a line on stderr would break a live display."""
    before, _Watch.show = _Watch.show, show
    try:
        yield
    finally:
        _Watch.show = before


def _receive(number: int, frame: object) -> None:
    # Forked processes end silently.
    if os.getpid() == _Watch.process:
        if _Watch.open and not _Watch.unwinding:
            _Watch.unwinding = True
            if number == signal.SIGINT:
                _say_closing()
            raise Interrupted(number)
        with suppress(OSError):
            if sys.stdout is not None and sys.stdout.isatty():
                os.write(1, _SHOW_CURSOR)
            # Not through sys.stderr, which may be in the middle of a write.
            if line := _interrupt_line(Interrupted(number)):
                os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


def _say_closing() -> None:
    if _Watch.show is not None:
        _Watch.show(_CLOSING)
    elif os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            # Not through sys.stderr, which may be in the middle of a write.
            os.write(2, f"{_CLOSING}\n".encode())


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`; if an exception ends it, print one line to stderr and return the exit code.

    The code is 2 for bad input; 1 if a process was lost or the operating system refused something, such as space on a
    disk; and as in shells 130 for an interrupt, 143 for a termination, and 141, without a line, for a closed pipe. A
    note that was added to the exception is appended to the line.
    In a job of several processes only the main one prints; others do if it has not ended the job within 5 s.
    """
    if logging.lastResort is not None:
        # Prints the engine's warnings.
        logging.lastResort.setFormatter(PrintableFormatter())
    watch_signals()
    try:
        main()
        # Flushed here, to report an error as one of `main`. None if stdout was closed before the start.
        if sys.stdout is not None:
            sys.stdout.flush()
    except (InputError, ProcessLostError) as error:
        _tell_once(error, str(error))
        return BAD_INPUT if isinstance(error, InputError) else BROKEN_OFF
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not hasattr(error, "__notes__"):
            return 128 + signal.SIGPIPE
        reason = error.strerror.lower() if error.strerror else one_line(error)
        expected = _EXPECTED.get(error.errno or 0, "expected a place that can be read and written")
        _tell_once(error, f"{error.filename or 'output'}: found {reason}, {expected}")
        return BROKEN_OFF
    except RuntimeError as error:
        # DeepSpeed talks to the other processes without `Processes`. Where it is in use, torch is imported already.
        from fedra_engine.runtime.processes import lost_process

        if (lost := lost_process(error)) is None:
            raise
        _tell_once(error, str(lost))
        return BROKEN_OFF
    except KeyboardInterrupt as interrupt:
        if line := _interrupt_line(interrupt):
            _print(line)
        return 128 + (interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT)
    return 0


def end(code: int) -> NoReturn:
    """End this process with the exit `code`.

    A process that has joined others skips C++ destructors, which a thread of torch.distributed that is still waiting
    (DeepSpeed may leave some) would crash.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    # Errors have been reported; Python would flush again and print another one.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    os._exit(code)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends for any reason; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_TELL_PARENT_DIED, signal.SIGKILL)


def _interrupt_line(interrupt: KeyboardInterrupt) -> str:
    """The line to print; empty unless this is the main process."""
    if os.environ.get("RANK", "0") != "0":
        return ""
    message = str(interrupt) or _SIGNALS[signal.SIGINT]
    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ and message == _SIGNALS[signal.SIGTERM]:
        message = (
            "error: the launcher ended the job, as it does when it is terminated or one of its processes has died; "
            "the rounds in checkpoints/ are kept"
        )
    return _line(interrupt, message)


def _tell_once(error: Exception, message: str) -> None:
    index = os.environ.get("RANK", "0")
    if index != "0":
        time.sleep(MAIN_SPEAKS_FIRST)
    _print(_line(error, f"process {index}: error: {message}" if index != "0" else f"error: {message}"))


def _line(error: BaseException, message: str) -> str:
    # The outermost note was added last.
    notes = getattr(error, "__notes__", [])[-1:]
    return "; ".join(" ".join(part.split()) for part in (message, *notes))


def _print(line: str) -> None:
    # A launcher sends the other processes a signal when one has died.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)

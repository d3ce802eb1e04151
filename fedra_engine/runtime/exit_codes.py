"""How a launcher ends: one line and an exit code, never a traceback, however many processes there are.

Nothing here may import more than this package's errors: a launcher imports this first, and signals that arrive while it
imports the rest are answered by what is here.
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
"""Something of the machine failed; the same may succeed later."""
BAD_INPUT = 2
MAIN_SPEAKS_FIRST = 5.0
"""Seconds that the other processes wait before they print. Once the main process has ended, `torchrun` ends them."""
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Those that end a run as it is, with what is said then; the exit code is 128 and the signal's number."""
_TELL_PARENT_DIED = 1
"""Linux's PR_SET_PDEATHSIG."""
_SHOW_CURSOR = b"\x1b[?25h"
"""A live display hides it."""
_EXPECTED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "expected room for it on its disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "expected a place that this user may use"),
    errno.EROFS: "expected a disk that can be written",
}


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(_SIGNALS[signal.Signals(number)])
        self.number = number


class _Watch:
    """The process that answers signals, how much it has open that has to be closed, and whether it is closing that."""

    process: int | None = None
    open = 0
    unwinding = False


def watch_signals() -> None:
    """Answer signals from now on: end at once, unless within `unwound_by_signals`, and at once when asked again."""
    _Watch.process, _Watch.open, _Watch.unwinding = os.getpid(), 0, False
    for number in _SIGNALS:
        # Shells have commands in the background ignore interrupts.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Within, the first signal raises `Interrupted`, so that what is open is closed."""
    _Watch.open += 1
    try:
        yield
    finally:
        _Watch.open -= 1


def _receive(number: int, frame: object) -> None:
    # Processes that were forked from this one have nothing to say.
    if os.getpid() == _Watch.process:
        if _Watch.open and not _Watch.unwinding:
            _Watch.unwinding = True
            raise Interrupted(number)
        with suppress(OSError):
            if sys.stdout is not None and sys.stdout.isatty():
                os.write(1, _SHOW_CURSOR)
            # Python's own stream may be in the middle of a line.
            if line := _interrupt_line(Interrupted(number)):
                os.write(2, f"{line}\n".encode())
    os._exit(128 + number)


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`, and turn what ends it early into one line on stderr and a code.

    2 for bad input; 1 when a process was lost or the operating system refused something, such as room on a disk; 130
    for an interrupt, 143 when terminated, and 141, without a line, when nobody reads on what is printed, as shells
    have it. A note that was added to an exception says how to go on.
    In a job of several processes only the main one prints; others print only if it has not ended the job within 5 s.
    """
    if logging.lastResort is not None:
        # Prints the engine's warnings.
        logging.lastResort.setFormatter(PrintableFormatter())
    watch_signals()
    try:
        main()
        # What was printed may not have been written yet. There is no stdout if it was closed before the start.
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

    One that has met others goes without the destructors of C++: a thread of torch.distributed that still waits then,
    of which DeepSpeed can leave some, would make it crash in its last moment.
    """
    # All has been said.
    for number in _SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    # What cannot be written has been reported; Python would try again, and report it in its own way.
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


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends, however that happens; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_TELL_PARENT_DIED, number)


def _interrupt_line(interrupt: KeyboardInterrupt) -> str:
    """The line to print; empty in a process that is not the main one."""
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
    # When one process has died, a launcher ends the others with a signal.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)

"""How a launcher ends: bad input is one line and exit code 2, never a traceback, however many processes there are."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from fedra_engine.errors import InputError, PrintableFormatter, ProcessLostError, printable

PROCESS_LOST = 1
BAD_INPUT = 2
INTERRUPTED = 130
MAIN_SPEAKS_FIRST = 5.0
"""Seconds that the other processes wait before they print. Once the main process has ended, `torchrun` ends them."""


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`. Bad input becomes one line on stderr and 2, a lost process 1, an interrupt 130, as shells have it.

    In a job of several processes only the main one prints; others print only if it has not ended the job within 5 s.
    """
    if logging.lastResort is not None:
        # Prints the engine's warnings.
        logging.lastResort.setFormatter(PrintableFormatter())
    if _leads_others():
        # When one process has died, a launcher ends the others with this signal.
        signal.signal(signal.SIGTERM, _ended_by_launcher)
    try:
        main()
    except (InputError, ProcessLostError) as error:
        _tell_once(f"error: {' '.join(str(error).split())}")
        return BAD_INPUT if isinstance(error, InputError) else PROCESS_LOST
    except RuntimeError as error:
        # DeepSpeed talks to the other processes without `Processes`. Where it is in use, torch is imported already.
        from fedra_engine.processes import lost_process

        if (lost := lost_process(error)) is None:
            raise
        _tell_once(f"error: {' '.join(str(lost).split())}")
        return PROCESS_LOST
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(str(interrupt) or "interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def end(code: int) -> NoReturn:
    """End this process with the exit `code`.

    One that has met others goes without the destructors of C++: a thread of torch.distributed that still waits then,
    of which DeepSpeed can leave some, would make it crash in its last moment.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell_once(message: str) -> None:
    index = os.environ.get("RANK", "0")
    if _leads_others():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif index != "0":
        time.sleep(MAIN_SPEAKS_FIRST)
        message = f"process {index}: {message}"
    print(printable(message), file=sys.stderr, flush=True)


def _leads_others() -> bool:
    return os.environ.get("RANK") == "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def _ended_by_launcher(signal_number: int, frame: object) -> None:
    raise ProcessLostError(
        "the launcher ended the job, as it does when one of its processes has died; the rounds in checkpoints/ are kept"
    )

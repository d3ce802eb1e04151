"""Call a function with many items, one after another or in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

from fedra_engine.config.parsing import import_modules
from fedra_engine.runtime.errors import ProcessLostError

Item = TypeVar("Item")
Result = TypeVar("Result")


def work_off(
    items: Sequence[Item], jobs: int, work: Callable[[Item], Result], report: Callable[[Result], None]
) -> None:
    """Call `work` with every item, `jobs` at a time.

    Args:
        items: picklable, and so are the results.
        jobs: more than one are processes of one thread each; one is this process, with all its threads.
        work: a module's function. An exception that it raises stops all processes.
        report: called with every result as soon as it is known.

    Raises:
        ProcessLostError: one of the processes was killed; the others are stopped.
    """
    if jobs == 1 or len(items) < 2:
        for item in items:
            report(work(item))
        return
    waiting = iter(items[jobs:])
    with _workers(items[:jobs], work) as workers:
        while workers:
            for worker in wait(workers):
                assert isinstance(worker, Connection)
                try:
                    result = worker.recv()
                    following = next(waiting, None)
                    worker.send(following)
                except (EOFError, OSError) as error:
                    raise ProcessLostError(
                        "jobs: a process that executed runs was killed, perhaps for want of memory; all rounds are "
                        "kept, and the same command resumes the runs"
                    ) from error
                if isinstance(result, Exception):
                    raise result
                if following is None:
                    workers.remove(worker)
                report(result)


@contextmanager
def _workers(items: Sequence[Item], work: Callable[[Item], object]) -> Iterator[list[Connection]]:
    """Start a process for each of the items; yields the connections to them, and waits for their end."""
    # Forked processes would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    connections, processes = list[Connection](), list[SpawnProcess]()
    try:
        # Workers inherit the mask: they never see the terminal's interrupts, on which this process stops them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for item in items:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, work, item))
                process.start()
                processes.append(process)
                connections.append(ours)
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield connections
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()


def _serve(parent: Connection, work: Callable[[Any], object], item: Any) -> None:
    """The worker's loop: send the item's result or error, and receive the next item, until it is None."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Raised when the parent has ended.
    with suppress(EOFError, OSError):
        while item is not None:
            try:
                import_modules()
                result = work(item)
            except Exception as error:
                # Errors in the program need their traceback; the others are shown as one line.
                if not isinstance(error, OSError | ProcessLostError):
                    error.add_note(traceback.format_exc())
                result = error
            parent.send(result)
            item = parent.recv()


def _end_with_parent() -> None:
    """End this process when its parent ends, which, when killed, cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

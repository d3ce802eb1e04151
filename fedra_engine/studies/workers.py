"""Work on many things one after another, or in several processes."""

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
        items: can be pickled, as their results can.
        jobs: several are processes of one thread each; a single one is this process, and has all its threads.
        work: a function of a module.
        report: called with every result as soon as it is known.

    Raises:
        ProcessLostError: one of the processes was killed. As whatever `work` raises, this stops the others.
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
                        "kept, and the same command goes on"
                    ) from error
                if isinstance(result, Exception):
                    raise result
                if following is None:
                    workers.remove(worker)
                report(result)


@contextmanager
def _workers(items: Sequence[Item], work: Callable[[Item], object]) -> Iterator[list[Connection]]:
    """Connections to processes, each of which has one of the items; they have ended afterwards."""
    # Forked processes would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    connections, processes = list[Connection](), list[SpawnProcess]()
    try:
        # A terminal sends an interrupt to all its processes; the first one stops the others, which never see it.
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
    """Be a worker: send what becomes of the item, or the error, and take the next one, until the parent sends None."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Raised when the parent has ended.
    with suppress(EOFError, OSError):
        while item is not None:
            try:
                import_modules()
                result = work(item)
            except Exception as error:
                # A fault of the program is looked for where it happened. Of the others one line is shown.
                if not isinstance(error, OSError | ProcessLostError):
                    error.add_note(traceback.format_exc())
                result = error
            parent.send(result)
            item = parent.recv()


def _end_with_parent() -> None:
    """End this process with the one that started it: killed, that one could not end the others."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

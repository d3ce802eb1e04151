"""Execute the runs of a comparison, one after another or by several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from fedra_engine.commands.parsing import import_modules
from fedra_engine.comparison.plan import PlannedRun
from fedra_engine.comparison.runs import Outcome, execute
from fedra_engine.runtime.errors import ProcessLostError
from fedra_engine.runtime.exit_codes import unwound_by_signals

Report = Callable[[Outcome], None]
"""Called with every outcome as soon as it is known."""


def execute_all(runs: Sequence[PlannedRun], jobs: int, report: Report) -> list[Outcome]:
    """Execute `runs`, `jobs` at a time; those that another process was executing are looked after again at the end.

    An interrupt, or an error other than bad input, stops all of them; each goes on from its last round when asked for
    again.

    Returns:
        The last outcome of each run.

    Raises:
        ProcessLostError: one of the processes was killed.
    """
    with unwound_by_signals():
        try:
            return _execute_twice(runs, jobs, report)
        except (KeyboardInterrupt, OSError) as error:
            error.add_note("the same command goes on")
            raise


def _execute_twice(runs: Sequence[PlannedRun], jobs: int, report: Report) -> list[Outcome]:
    outcomes = _execute(runs, jobs, report)
    again = [outcome.run for outcome in outcomes if outcome.state == "busy"]
    if not again:
        return outcomes
    return [outcome for outcome in outcomes if outcome.state != "busy"] + _execute(again, jobs, report)


def _execute(runs: Sequence[PlannedRun], jobs: int, report: Report) -> list[Outcome]:
    if jobs > 1 and len(runs) > 1:
        return _execute_in_processes(runs, jobs, report)
    outcomes = []
    for run in runs:
        outcomes.append(execute(run))
        report(outcomes[-1])
    return outcomes


def _execute_in_processes(runs: Sequence[PlannedRun], jobs: int, report: Report) -> list[Outcome]:
    # Forked processes would inherit torch's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    outcomes = []
    with ProcessPoolExecutor(min(jobs, len(runs)), context, initializer=_start_worker) as pool:
        try:
            # A terminal sends an interrupt to all its processes; the first one stops the others, which never see it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(execute, run) for run in runs]
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for future in as_completed(futures):
                outcomes.append(_outcome(future))
                report(outcomes[-1])
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return outcomes


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ProcessLostError(
            "jobs: a process that executed runs was killed, perhaps for want of memory; all rounds are kept, and the "
            "same command goes on"
        ) from error


def _start_worker() -> None:
    import_modules()
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with the one that started it: killed, that one could not end the others."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

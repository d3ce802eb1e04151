"""The process of a contestant: reads jobs and commands from stdin, a line of JSON each, and answers on stdout.

python -m benchmarks.peers.worker <module in benchmarks/peers/contestants>
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch

from benchmarks.peers.job import Job
from benchmarks.peers.work import State
from fedra_engine.runtime.exit_codes import die_with_parent


def cpu_seconds() -> float:
    """CPU time of this process and of all that it has started."""
    own, times = psutil.Process(), os.times()
    total = time.process_time() + times.children_user + times.children_system
    for child in own.children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


def main() -> None:
    """Serve jobs until there are no more: `{"job": …}`, then `{"round": file or null}` until `{"end": true}`.

    Each round is answered by its CPU and wall-clock seconds; its state is saved to the file.
    """
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    module = import_module(f"benchmarks.peers.contestants.{sys.argv[1]}")
    _answer(answers, {"started": True})
    for line in iter(sys.stdin.readline, ""):
        job = Job(**json.loads(line)["job"])
        torch.set_num_threads(job.threads)
        module.serve(job, _loop(answers))
        gc.collect()
        _answer(answers, {"ended": True})


def _loop(answers: TextIO) -> Callable[[Callable[[], State]], None]:
    def loop(run_round: Callable[[], State]) -> None:
        _answer(answers, {"ready": True})
        for line in iter(sys.stdin.readline, ""):
            command = json.loads(line)
            if "end" in command:
                return
            cpu, wall = cpu_seconds(), time.perf_counter()
            state = run_round()
            took = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
            if command["round"] is not None:
                torch.save(state, Path(command["round"]))
            _answer(answers, took)

    return loop


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()

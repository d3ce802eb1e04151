"""What a run's start costs: from the beginning of its process to its first local step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedra_engine.runtime.errors import InputError

_RUN = """
import json, logging, pathlib, sys, time
from fedra_engine.commands.simulate import main
from fedra_engine.runtime.exit_codes import exit_code
from fedra_engine.runtime.stages import LOCAL_STEPS

class FirstSteps(logging.Handler):
    cpu = 0.0

    def emit(self, record):
        if not self.cpu and record.args and record.args[0] == LOCAL_STEPS:
            FirstSteps.cpu = time.process_time() - record.args[1]

logger = logging.getLogger("fedra_engine.runtime.stages")
logger.setLevel(logging.DEBUG)
logger.addHandler(FirstSteps())
file, *arguments = sys.argv[1:]
code = exit_code(lambda: main(arguments))
pathlib.Path(file).write_text(json.dumps([FirstSteps.cpu, time.process_time(), len(sys.modules)]))
sys.exit(code)
"""


@dataclass(frozen=True)
class StartTimes:
    """Times of a run of one round.

    Attributes:
        first_step: CPU-seconds of its process before its first local step.
        whole: CPU-seconds of its process.
        modules: that were imported.
    """

    first_step: float
    whole: float
    modules: int

    def row(self) -> dict[str, Any]:
        """The times, for a table."""
        return {"before the first step": self.first_step, "whole run": self.whole, "modules": self.modules}


def measure_start(arguments: Sequence[str], repeats: int) -> StartTimes:
    """Run `fedra simulate` with `arguments` for one round, once for the caches and then `repeats` times; the fastest.

    Raises:
        InputError: a run failed.
    """
    _start(arguments)
    return min((_start(arguments) for _ in range(repeats)), key=lambda times: times.first_step)


def _start(arguments: Sequence[str]) -> StartTimes:
    with TemporaryDirectory() as folder:
        file = Path(folder, "times.json")
        options = [*arguments, "--rounds", "1", "--output_dir", folder, "--quiet"]
        run = [sys.executable, "-c", _RUN, str(file), *options]
        done = subprocess.run(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise InputError(f"start: found a run that failed ({''.join(last)}), expected one that can be trained")
        return StartTimes(*json.loads(file.read_text()))

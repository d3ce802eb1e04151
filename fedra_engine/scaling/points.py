"""Measure points in processes of their own, or find them measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from filelock import FileLock, Timeout

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.commands.parsing import read_config
from fedra_engine.config.differences import RESULT_NEUTRAL, differences
from fedra_engine.runtime.errors import InputError, ProcessLostError
from fedra_engine.runtime.exit_codes import BAD_INPUT, die_with_parent, unwound_by_signals
from fedra_engine.runtime.files import check_own
from fedra_engine.runtime.processes import check_cores, check_places
from fedra_engine.scaling.measurement import Measurement, measurement_file
from fedra_engine.scaling.plan import Point

_IRRELEVANT = RESULT_NEUTRAL - {"execution"}
"""Fields that change nothing of a measurement."""
_SECONDS_TO_END = 10
"""That a measuring process has before it is killed."""


def check_points(points: Sequence[Point], *, oversubscribe: bool) -> None:
    """Find out before the first measurement what would be in the way of a later one.

    Raises:
        InputError: a process has more threads than there are cores; the processes together need more cores (unless
            `oversubscribe`) or GPUs than there are; or a point's folder belongs to something else.
    """
    for point in points:
        check_cores("threads", point.threads)
        check_places("processes", point.processes, point.threads, oversubscribe=oversubscribe)
        check_own([point.path], point.lock_file)


def earlier_measurement(point: Point) -> Measurement | None:
    """What an earlier command measured; None if there is nothing.

    Raises:
        InputError: it was measured with other settings, or cannot be read.
    """
    folder, file = RunFolder(point.path), measurement_file(point.path)
    if not file.is_file() or not folder.config_file.is_file():
        return None
    before = read_config(folder.config_file)
    measurement = Measurement.read(file)
    changed = list(differences(before, point.config, _IRRELEVANT))
    for name in ("clients", "processes", "threads"):
        if getattr(measurement, name) != getattr(point, name):
            changed.append((name, getattr(measurement, name), getattr(point, name)))
    for field, found, expected in changed:
        raise InputError(
            f"{field}: found {found} in {point.path}, expected {expected} as this command has it (or another "
            "output_dir)"
        )
    return measurement


def measure(point: Point) -> Measurement:
    """Measure a point, unless it has been measured.

    Raises:
        InputError: the settings cannot be used, or another command is measuring the point.
        ProcessLostError: a process that measured it died.
    """
    point.path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(point.lock_file, timeout=0):
            if (earlier := earlier_measurement(point)) is not None:
                return earlier
            RunFolder(point.path).write_config(point.config)
            _run_worker(point)
    except Timeout as error:
        raise InputError(
            f"output_dir: found another command that measures {point.path}, expected one at a time"
        ) from error
    return Measurement.read(measurement_file(point.path))


def _run_worker(point: Point) -> None:
    """Let fresh processes measure `point`; what they print goes to its `worker.log`."""
    launch = [sys.executable]
    if point.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point.processes}"]
    command = [*launch, "-m", "fedra_engine.scaling.worker", str(point.path), str(point.threads), str(point.seconds)]
    log = point.path / "worker.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(point.threads)}
    # A terminal's interrupt is for this process, which ends the other ones.
    with (
        log.open("w") as output,
        unwound_by_signals(),
        subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Killed, this process cannot end them, and they would slow down the next measurement.
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
        ) as worker,
    ):
        try:
            code = worker.wait()
        except KeyboardInterrupt as interrupt:
            # torchrun ends its processes on this signal, but not when it is killed.
            worker.terminate()
            with suppress(subprocess.TimeoutExpired):
                worker.wait(_SECONDS_TO_END)
            worker.kill()
            interrupt.add_note("the same command goes on")
            raise
    if code == 0 and measurement_file(point.path).is_file():
        return
    reported = re.search(r"^(?:process \d+: )?error: (.*)$", log.read_text(), re.MULTILINE)
    # torchrun has an exit code of its own for whatever made a process end.
    if reported and (code == BAD_INPUT or point.processes > 1):
        raise InputError(reported[1])
    raise ProcessLostError(f"a process that measured {point.title} ended with exit code {code}; its output is in {log}")

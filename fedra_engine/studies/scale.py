"""Measure rounds of more and more clients, each point in processes of its own, or find them measured."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

from filelock import FileLock, Timeout

from fedra_engine.callbacks.fingerprint import RESULT_NEUTRAL
from fedra_engine.callbacks.run_folder import RunFolder, make_folder
from fedra_engine.config.parsing import read_config
from fedra_engine.runtime.errors import InputError, ProcessLostError
from fedra_engine.runtime.exit_codes import BAD_INPUT, die_with_parent, unwound_by_signals
from fedra_engine.runtime.files import check_own
from fedra_engine.runtime.processes import check_cores, check_places
from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text
from fedra_engine.studies.measurements import MEASUREMENT, REPORT, Measurement, fit_texts, projection_text, write_report
from fedra_engine.studies.plan import Point, Scaling, differences, refuse_changes
from fedra_engine.studies.report import command_text

_IRRELEVANT = RESULT_NEUTRAL - {"execution"}
"""Fields that change nothing of a measurement."""
_SECONDS_TO_END = 10
"""That a measuring process has before it is killed."""


def scale(scaling: Scaling) -> None:
    """Measure what is missing of the points that a command asks for, and report on all of them.

    Raises:
        InputError: a process has more threads than there are cores; the processes together need more cores (unless
            oversubscribed) or GPUs than there are; a point's folder belongs to something else; or the experiment
            cannot be used.
        ProcessLostError: a process died that measured a point.
    """
    points, folder, console = scaling.points, scaling.output_dir, PlainConsole()
    # What would be in the way of a later point is known before the first.
    for point in points:
        check_cores("threads", point.threads)
        check_places(point.processes, point.threads, oversubscribe=scaling.oversubscribe)
        check_own([point.path], point.lock_file)
    REPORT.check(folder)
    make_folder(folder)
    found = [earlier_measurement(point) for point in points]
    measurements = list[Measurement]()
    for number, (point, earlier) in enumerate(zip(points, found, strict=True), start=1):
        measurements.append(earlier or measure(point))
        note = " (measured before)" if earlier else ""
        console.print(f"{number}/{len(points)}  {point.title}: {measurements[-1].seconds:.3g} s a round{note}")
        # What is known is not lost when a later point fails.
        projection = projection_text(measurements, scaling.projected, scaling.network)
        rows = write_report(folder, command_text(), measurements, projection)
    where = f"scaling.md, .csv and .png are in {folder}"
    console.print("", table_text(rich_table(rows)), "", *fit_texts(measurements), "", where, sep="\n", soft_wrap=True)


def earlier_measurement(point: Point) -> Measurement | None:
    """What an earlier command measured; None if there is nothing.

    Raises:
        InputError: it was measured with other settings, or cannot be read.
    """
    config_file, file = RunFolder(point.path).config_file, point.path / MEASUREMENT
    if not file.is_file() or not config_file.is_file():
        return None
    measurement = Measurement.read(file)
    refuse_changes(differences(read_config(config_file), point.config, _IRRELEVANT), point.path)
    for name in ("clients", "processes", "threads"):
        if (found := getattr(measurement, name)) != (expected := getattr(point, name)):
            refuse_changes([(name, found, expected)], point.path)
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
            _measure_in_processes(point)
    except Timeout as error:
        raise InputError(
            f"output_dir: found another command that measures {point.path}, expected one at a time"
        ) from error
    return Measurement.read(point.path / MEASUREMENT)


def _measure_in_processes(point: Point) -> None:
    """Let fresh processes measure `point`; what they print goes to its `worker.log`."""
    log, launch = point.path / "worker.log", [sys.executable]
    if point.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={point.processes}"]
    # A terminal's interrupt is for this process, which ends the other ones.
    with (
        log.open("w") as output,
        unwound_by_signals(),
        subprocess.Popen(
            [*launch, "-m", "fedra_engine.studies.measure", str(point.path), str(point.threads), str(point.seconds)],
            env={**os.environ, "OMP_NUM_THREADS": str(point.threads)},
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
    if code == 0 and (point.path / MEASUREMENT).is_file():
        return
    reported = re.search(r"^(?:process \d+: )?error: (.*)$", log.read_text(), re.MULTILINE)
    # torchrun has an exit code of its own for whatever made a process end.
    if reported and (code == BAD_INPUT or point.processes > 1):
        raise InputError(reported[1])
    raise ProcessLostError(f"a process that measured {point.title} ended with exit code {code}; its output is in {log}")

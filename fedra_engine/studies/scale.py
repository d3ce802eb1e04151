"""Measure rounds of more and more clients, each point in processes of its own, or reuse earlier measurements."""

from __future__ import annotations

import re
import sys

from filelock import FileLock, Timeout

from fedra_engine.callbacks.fingerprint import RESULT_NEUTRAL
from fedra_engine.callbacks.run_folder import RunFolder, make_folder
from fedra_engine.config.parsing import read_config
from fedra_engine.runtime.errors import InputError, ProcessLostError
from fedra_engine.runtime.exit_codes import BAD_INPUT
from fedra_engine.runtime.files import check_own
from fedra_engine.runtime.launch import run_job
from fedra_engine.runtime.processes import check_cores, check_places
from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text
from fedra_engine.studies.measurements import MEASUREMENT, REPORT, Measurement, fit_texts, projection_text, write_report
from fedra_engine.studies.plan import Point, Scaling, differences, refuse_changes
from fedra_engine.studies.report import command_text

_IRRELEVANT = RESULT_NEUTRAL - {"execution"}
"""Fields that do not change a measurement."""


def scale(scaling: Scaling) -> None:
    """Measure the points of `scaling` that have not been measured, and report on all of them.

    Raises:
        InputError: there are too few cores or GPUs; a point's folder belongs to something else or is in use; or the
            experiment cannot be used.
        ProcessLostError: a measuring process died.
    """
    points, folder, console = scaling.points, scaling.output_dir, PlainConsole()
    # All points are checked before the first is measured.
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
        # Written after every point, in case a later one fails.
        projection = projection_text(measurements, scaling.projected, scaling.network)
        rows = write_report(folder, command_text(), measurements, projection)
    where = f"scaling.md, .csv and .png are in {folder}"
    console.print("", table_text(rich_table(rows)), "", *fit_texts(measurements), "", where, sep="\n", soft_wrap=True)


def earlier_measurement(point: Point) -> Measurement | None:
    """Read an earlier measurement, None if there is none; InputError if it is damaged or of other settings."""
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
    """Measure a point, unless it has been measured."""
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
    """Measure `point` in fresh processes, whose output goes to its `worker.log`."""
    log = point.path / "worker.log"
    measured = [str(point.path), str(point.threads), str(point.seconds)]
    with log.open("w") as output:
        end = run_job(
            [sys.executable, "-m", "fedra_engine.studies.measure", *measured],
            point.processes,
            environment={"OMP_NUM_THREADS": str(point.threads)},
            output=output,
        )
    if end.interrupt is not None:
        end.interrupt.add_note("the same command resumes it")
        raise end.interrupt
    if end.code == 0 and (point.path / MEASUREMENT).is_file():
        return
    reported = re.search(r"^(?:process \d+: )?error: (.*)$", log.read_text(), re.MULTILINE)
    if reported and end.code == BAD_INPUT:
        raise InputError(reported[1])
    raise ProcessLostError(f"{point.title}: {end.reason}, expected a measurement; its output is in {log}")

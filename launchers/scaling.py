"""Measures rounds of more and more clients, on one or several processes.

python launchers/scaling.py --clients 10,100,1000,10000 --processes 1,2
"""

from __future__ import annotations

import shlex
import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """Measure the points that the command line asks for and that are missing, and report on all of them.

    Raises:
        InputError: the command line, or the experiment, cannot be used.
        ProcessLostError: a process died that measured a point.
    """
    from fedra_engine.scaling.plan import parse_study

    study = parse_study(sys.argv[1:])
    # Imported late: they take seconds, and a mistyped option should fail at once.
    from fedra_engine.callbacks.run_folder import make_folder
    from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text
    from fedra_engine.scaling.points import check_points, earlier_measurement, measure
    from fedra_engine.scaling.report import check_report, fit_texts, projection_text, write_report
    from fedra_engine.scaling.tables import cells

    console = PlainConsole()
    check_points(study.points, oversubscribe=study.oversubscribe)
    check_report(study.output_dir)
    make_folder(study.output_dir)
    found = [earlier_measurement(point) for point in study.points]
    measurements = []
    for number, (point, earlier) in enumerate(zip(study.points, found, strict=True), start=1):
        measurement = measure(point) if earlier is None else earlier
        measurements.append(measurement)
        note = "" if earlier is None else " (measured before)"
        console.print(f"{number}/{len(study.points)}  {point.title}: {measurement.seconds:.3g} s a round{note}")
        # What is known is not lost when a later point fails.
        projection = projection_text(measurements, study.projected, study.network)
        write_report(study.output_dir, shlex.join(["python", *sys.argv]), measurements, projection)
    table = table_text(rich_table(cells(measurements)))
    where = f"scaling.md, .csv and .png are in {study.output_dir}"
    console.print("", table, "", *fit_texts(measurements), "", where, sep="\n", soft_wrap=True)


if __name__ == "__main__":
    end(exit_code(main))

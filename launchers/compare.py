"""Compares methods: runs every method with every seed, and puts accuracies and costs side by side.

python launchers/compare.py --methods fedra,inclusivefl --seeds 0,1,2
"""

from __future__ import annotations

import os
import shlex
import sys

from fedra_engine.runtime.exit_codes import end, exit_code


def main() -> None:
    """Execute what is missing of the runs that the command line asks for, and report on all of them.

    Raises:
        InputError: the command line cannot be used; or, after all others and the report, that runs failed.
    """
    from fedra_engine.commands.parsing import quiet_libraries
    from fedra_engine.comparison.plan import parse_comparison
    from fedra_engine.runtime.errors import InputError

    comparison = parse_comparison(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "processes: found several started by a launcher, expected one (--jobs runs several experiments at a time)"
        )
    # A bar for every model that is loaded would come between the lines of a terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_libraries()
    # Imported late: they take seconds, and a mistyped option should fail at once.
    from fedra_engine.callbacks.run_folder import make_folder
    from fedra_engine.comparison.report import check_report, remove_report, write_report
    from fedra_engine.comparison.runs import Outcome, check_runs, read_result
    from fedra_engine.comparison.workers import execute_all
    from fedra_engine.runtime.processes import check_cores
    from fedra_engine.runtime.tables import PlainConsole, rich_table, table_text

    console = PlainConsole()
    reported = 0

    def report(outcome: Outcome) -> None:
        nonlocal reported
        reported += outcome.state != "busy"
        counter = f"{reported:>{len(str(len(comparison.runs)))}}/{len(comparison.runs)}"
        console.print(f"{counter}  {outcome.run.title}: {outcome.note}", soft_wrap=True)

    if not comparison.oversubscribe:
        # There are never more processes than runs.
        check_cores(
            "jobs", min(comparison.jobs, len(comparison.runs)), advice=" (--oversubscribe true lets runs share cores)"
        )
    check_runs(comparison.runs)
    check_report(comparison.output_dir)
    make_folder(comparison.output_dir)
    said = f"{len(comparison.runs)} runs in {comparison.output_dir}; each writes its progress to its run.log"
    console.print(said, soft_wrap=True)
    outcomes = {outcome.run.path: outcome for outcome in execute_all(comparison.runs, comparison.jobs, report)}
    in_order = [outcomes[run.path] for run in comparison.runs]
    results = [read_result(outcome.run) for outcome in in_order if outcome.state == "done"]
    if results:
        missing = [outcome for outcome in in_order if outcome.state != "done"]
        rows = write_report(comparison.output_dir, shlex.join(["python", *sys.argv]), results, missing)
        where = f"comparison.md, .csv and .tex and accuracy_by_round.png are in {comparison.output_dir}"
        console.print("", table_text(rich_table(rows)), "", where, sep="\n", soft_wrap=True)
    else:
        remove_report(comparison.output_dir)
    failed = [outcome.run.title for outcome in in_order if outcome.state == "failed"]
    if failed:
        raise InputError(
            f"methods: found {len(failed)} of {len(comparison.runs)} runs that failed ({', '.join(failed)}), expected "
            "all to finish (the reasons are above)"
        )
    if not results:
        raise InputError(
            f"methods: found all {len(comparison.runs)} runs being executed by other processes, expected one that is "
            "finished (there is no table; run the command again later)"
        )


if __name__ == "__main__":
    end(exit_code(main))

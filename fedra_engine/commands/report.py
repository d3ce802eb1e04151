"""`report`: a page of what came of a run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedra_engine.config.parsing import CommandOption, NoFields, Parser, asks_for_help, split_options, split_positional
from fedra_engine.runtime.errors import InputError, count_of

DESCRIPTION = """A report of a run as one HTML page: accuracies, who trained what, and at what cost.

  fedra report runs/NAME
  fedra report runs/NAME runs/OTHER --output comparison.html
  fedra report runs/NAME --figures figures

A run leaves this page in its folder when it ends. Several runs are compared side by side.
"""
_OPTIONS = (
    CommandOption("output", "FILE", "Where the page goes; the run's own report.html if there is one run"),
    CommandOption("figures", "FOLDER", "Where the page's charts go, too, as SVG and PNG"),
)
PARSER = Parser(NoFields, DESCRIPTION, _OPTIONS, reads_files=False)


def main(arguments: Sequence[str]) -> None:
    """Write the report of the runs named by `arguments`."""
    options, rest = split_options(arguments, _OPTIONS)
    names, others = split_positional(rest)
    if asks_for_help(others):
        PARSER.parse(others)
    if others:
        raise InputError(f"report: found {others[0]}, expected folders of runs, --output and --figures alone")
    if not names:
        raise InputError("report: found no run, expected the folder of one: fedra report <folder>")
    if len(names) > 1 and options.output is None:
        raise InputError(f"output: found none with {count_of(len(names), 'run')}, expected a file for their page")
    from fedra_engine.callbacks.run_folder import REPORT
    from fedra_engine.report.page import read_page
    from fedra_engine.runtime.files import write_whole

    folders = [Path(name).expanduser() for name in names]
    output = folders[0] / REPORT if options.output is None else Path(options.output).expanduser()
    if output.is_dir():
        raise InputError(f"output: found the folder {output}, expected a file")
    page = read_page(folders)
    write_whole(output, page.html())
    print(f"report: {output}")
    if options.figures is not None:
        folder = Path(options.figures).expanduser()
        page.write_figures(folder)
        print(f"figures: {count_of(len(page.charts), 'chart')} in {folder}")

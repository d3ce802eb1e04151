"""The page: one HTML file of words, charts and tables, which needs no other; and its charts as files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedra_engine.callbacks.run_folder import REPORT
from fedra_engine.federation.averages import average
from fedra_engine.report import tables, words
from fedra_engine.report.charts import run_charts
from fedra_engine.report.comparison import Runs, comparison_charts
from fedra_engine.report.facts import RunFacts, read_run
from fedra_engine.report.marks import Chart
from fedra_engine.report.tables import Table
from fedra_engine.report.vega import DARK, LIGHT, javascript, png, svg, theme
from fedra_engine.runtime.files import make_folders, write_whole
from fedra_engine.runtime.measure_text import percent

_TEMPLATE = Path(__file__).parent / "page.html"


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: its name.
        subtitle: what was run, in a line.
        verdict: what came of it, in a few sentences.
        cards: numbers to see first, by title.
        warnings: what one must know before trusting the numbers.
        results: the tables above the charts.
        charts: all of them.
        tables: those below the charts.
    """

    title: str
    subtitle: str
    verdict: str
    cards: Mapping[str, str]
    warnings: Sequence[str]
    results: Sequence[Table]
    charts: Sequence[Chart]
    tables: Sequence[Table]

    def html(self) -> str:
        """The page as one file, with all that it needs."""
        # Slow to import.
        from jinja2 import Environment, StrictUndefined

        version = ""
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version("fedra-engine")
        template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return template.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
            page=self,
            themes={"light": theme(LIGHT), "dark": theme(DARK)},
            specs={chart.name: chart.spec for chart in self.charts},
            javascript=javascript(),
            version=version,
        )

    def write_figures(self, folder: Path) -> None:
        """Write every chart as SVG and PNG into `folder`; OSError if that cannot be written."""
        make_folders(folder)
        for chart in self.charts:
            write_whole(folder / f"{chart.name}.svg", svg(chart.spec))
            write_whole(folder / f"{chart.name}.png", png(chart.spec))


def read_page(folders: Sequence[Path]) -> Page:
    """The page of the run in a folder, or of several runs side by side; InputError if one cannot be read."""
    runs = [read_run(folder) for folder in folders]
    return run_page(runs[0]) if len(runs) == 1 else comparison_page(unique_names(runs))


def write_report(folder: Path) -> None:
    """Write the report of a run into its folder.

    Raises:
        InputError: the run cannot be read.
        OSError: the report cannot be written.
    """
    write_whole(folder / REPORT, read_page([folder]).html())


def run_page(run: RunFacts) -> Page:
    """The page of a single run."""
    start = run.start
    described = {} if start is None else start.described
    parts = [run.method, *(f"{name} {described[name]}" for name in ("model", "clients") if name in described)]
    costs = [tables.costs_table(start)] if start is not None and start.kinds else []
    below = [*tables.measures(run), *costs, tables.changed_settings(run), tables.all_settings(run)]
    if start is not None:
        below.append(tables.environment(start))
    return Page(
        title=run.name,
        subtitle=" · ".join(parts),
        verdict=words.verdict(run),
        cards=words.cards(run),
        warnings=words.warnings(run),
        results=tables.best_round(run),
        charts=run_charts(run),
        tables=below,
    )


def comparison_page(runs: Runs) -> Page:
    """The page of several runs side by side."""
    ended = {name: average(run.tuned) for name, run in runs.items() if run.has_ended}
    verdict = "None of the runs has ended."
    if len({runs[name].held_out for name in ended}) > 1:
        verdict = "Accuracies on validation samples cannot be compared with those on test samples: " + "; ".join(
            f"{name} has {percent(accuracy)} on {runs[name].held_out} samples" for name, accuracy in ended.items()
        )
        verdict += "."
    elif ended:
        best, lowest = max(ended, key=ended.__getitem__), min(ended, key=ended.__getitem__)
        verdict = f"{best} has the highest average accuracy, {percent(ended[best])}"
        verdict += "." if best == lowest else f"; {lowest} the lowest, {percent(ended[lowest])}."
    return Page(
        title=f"{len(runs)} runs side by side",
        subtitle=", ".join(runs),
        verdict=verdict,
        cards={},
        warnings=[f"{name}: {text}" for name, run in runs.items() for text in words.warnings(run)],
        results=[tables.results(runs), *tables.measures_of_runs(runs)],
        charts=comparison_charts(runs),
        tables=[tables.differences(runs)],
    )


def unique_names(runs: Sequence[RunFacts]) -> dict[str, RunFacts]:
    """The runs by the names of their folders; by the whole paths where two have the same name."""
    times = Counter(run.name for run in runs)
    return {run.name if times[run.name] == 1 else str(run.path): run for run in runs}

"""The charts that put several runs side by side; a run has the same colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedra_engine.federation.averages import average
from fedra_engine.report.charts import allocation, training_counts
from fedra_engine.report.facts import RunFacts
from fedra_engine.report.marks import FOUR_DIGITS, MOST_CELLS, MOST_POINTS, Chart, Rows, line_chart, thinned, tip
from fedra_engine.report.vega import Spec
from fedra_engine.runtime.spacing import evenly_spaced

_MOST_MAPS = 6
"""Runs whose allocations are shown."""
Runs = Mapping[str, RunFacts]
"""Runs by the name that they have in the charts."""


def comparison_charts(runs: Runs) -> list[Chart]:
    """All charts for which the runs have what they show."""
    made = [_accuracy(runs), _domains(runs), _loss(runs), _trainings(runs), *_allocations(runs)]
    return [chart for chart in made if chart is not None]


def _accuracy(runs: Runs) -> Chart | None:
    rows = [
        {"round": number, "series": name, "value": 100 * average(accuracy)}
        for name, run in runs.items()
        for number, accuracy in evenly_spaced([*run.curve.items()], _points(runs))
    ]
    spec = line_chart(rows, "accuracy (%)", ".1f", list(runs))
    note = "Average over the domains. Round 0 is the frozen model."
    return Chart("accuracy", "Accuracy by round", note, spec, wide=True) if rows else None


def _domains(runs: Runs) -> Chart | None:
    """The accuracy of every run on every domain, at its end."""
    rows = [
        {"domain": domain, "series": name, "value": 100 * value}
        for name, run in runs.items()
        for domain, value in run.tuned.items()
    ]
    if not rows:
        return None
    scale = {"zero": False, "nice": False, "padding": 24}
    spec: Spec = {
        "data": {"values": rows},
        "width": "container",
        "height": 26 * len({row["domain"] for row in rows}),
        "mark": {"type": "point", "filled": True, "size": 80, "opacity": 0.9},
        "params": [{"name": "picked", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}],
        "encoding": {
            "y": {"field": "domain", "type": "nominal", "sort": None, "title": None, "axis": {"grid": True}},
            "x": {"field": "value", "type": "quantitative", "title": "accuracy (%)", "scale": scale},
            "color": {"field": "series", "type": "nominal", "title": None, "scale": {"domain": list(runs)}},
            "opacity": {"condition": {"param": "picked", "value": 0.9}, "value": 0.12},
            "tooltip": [tip("domain"), tip("series", "run"), tip("value", "accuracy (%)", format=".1f")],
        },
    }
    return Chart("domains", "Accuracy by domain", "After the last round.", spec)


def _loss(runs: Runs) -> Chart | None:
    rows = [
        {"round": number, "series": name, "value": value}
        for name, run in runs.items()
        for number, value in thinned(run.rounds, lambda each: each.loss, _points(runs))
    ]
    spec = line_chart(rows, "loss", FOUR_DIGITS, list(runs))
    return Chart("loss", "Training loss", "Mean over the samples of a round.", spec) if rows else None


def _trainings(runs: Runs) -> Chart | None:
    """How many updates of a round trained each block, on average."""
    rows: Rows = []
    for name, run in runs.items():
        if any(each.trainers for each in run.rounds):
            counts = training_counts(run)
            rows += [
                {"block": block, "series": name, "value": count / len(run.rounds)}
                for block, count in enumerate(counts, 1)
            ]
    spec = line_chart(rows, "updates per round", ".2f", list(runs), zero=True, x="block")
    note = "How many updates of clients have trained a block, on average over the rounds."
    return Chart("trainings", "Trainings of each block", note, spec) if rows else None


def _allocations(runs: Runs) -> list[Chart | None]:
    charts, shown = list[Chart | None](), list(runs.items())[:_MOST_MAPS]
    for number, (name, run) in enumerate(shown, 1):
        if (chart := allocation(run, 2 * MOST_CELLS // len(shown))) is not None:
            charts.append(replace(chart, name=f"allocation_{number}", title=f"{chart.title}: {name}"))
    return charts


def _points(runs: Runs) -> int:
    """Points of each line, of which there are as many as runs."""
    return max(20, 4 * MOST_POINTS // len(runs))

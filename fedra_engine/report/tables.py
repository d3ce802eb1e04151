"""The tables of a report: results of several runs, costs, configurations, environment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedra_engine.callbacks.run_folder import BEST, measuring_command
from fedra_engine.federation.averages import average
from fedra_engine.report.facts import LOCATION_SETTINGS, RunFacts, StartFacts, worst
from fedra_engine.report.words import rounds_text
from fedra_engine.runtime.measure_text import change_text, measure_name, measure_number, percent
from fedra_engine.runtime.tables import Cells, bytes_text, duration_text, flops_text

_NOTHING = "–"
_WHEN = ("frozen", "tuned")


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: what it shows, in a few words.
        note: what else one must know to read it.
        rows: the header first.
        texts: whether its cells are words, and not numbers.
        folded: whether a click opens it.
        command: what to type for more; the note leads to it.
    """

    title: str
    note: str
    rows: Cells
    texts: bool = False
    folded: bool = False
    command: str = ""


def costs_table(start: StartFacts) -> Table:
    """What a round costs each kind of client."""
    names = ["blocks held", "trained", "rank", "clients", "FLOPs", "uploaded", "downloaded", "memory"]
    rows = [[*names, "of it frozen", "trained", "activations"]]
    for kind in start.kinds:
        parts = (kind.memory, kind.frozen_memory, kind.trained_memory, kind.activation_memory)
        sizes = [bytes_text(size) for size in (kind.uploaded, kind.downloaded, *parts)]
        counts = [f"{count:,}" for count in (kind.held, kind.trained, kind.rank, kind.clients)]
        rows.append([*counts, flops_text(kind.flops), *sizes])
    note = (
        "What a round costs a client, as counted for the first: FLOPs of training in the blocks, bytes sent and "
        "received, and memory, without that of single operations. The run's costs are these for every update."
    )
    return Table("Costs of a client", note, rows)


def measures(run: RunFacts) -> list[Table]:
    """Every measure by domain, before and after; no table for a run that has not ended, or measured accuracy alone."""
    found = run.summary.get("measures")
    if not found:
        return []
    accuracy: dict[str, Any] = {"frozen": run.frozen, "tuned": run.tuned}
    accuracy |= {f"average_{when}": average(of_domain) for when, of_domain in accuracy.items()}
    every = {"accuracy": accuracy, **found}
    rows = [["domain", *(measure_name(name, run.held_out) for name in every)]]
    for domain in run.tuned:
        rows.append([domain, *(change_text(name, *(of[when][domain] for when in _WHEN)) for name, of in every.items())])
    rows.append(
        ["average", *(change_text(name, *(of[f"average_{when}"] for when in _WHEN)) for name, of in every.items())]
    )
    return [Table("Measures by domain", "Of the frozen model, and after tuning.", rows)]


def best_round(run: RunFacts) -> list[Table]:
    """The accuracies of the last round and of the best one, and how to measure that; no table if none was kept."""
    if run.best is None or not run.has_ended:
        return []
    rows = [["accuracy (%)", "frozen", f"round {len(run.rounds):,}, the last", f"round {run.best.number:,}, the best"]]
    states = (run.frozen, run.tuned, run.best.accuracy)
    rows += [[domain, *(measure_number("accuracy", of[domain]) for of in states)] for domain in run.tuned]
    rows.append(["average", *(measure_number("accuracy", average(of)) for of in states)])
    command, measure = measuring_command(run.path, run.settings), measure_name(run.best.measure, run.held_out)
    note = f"On {run.held_out} samples. The best round by {measure} is kept in {BEST}/ of the run's folder."
    if command is not None:
        note += " Best round on the test samples:"
    return [Table("Results", note, rows, command=command or "")]


def changed_settings(run: RunFacts) -> Table:
    """The settings that differ from the embedded experiment."""
    rows = [["setting", "value", "default"]]
    rows += [[name, value_text(value), value_text(usual)] for name, (value, usual) in run.changed.items()]
    note = "Settings that differ from the defaults." if run.changed else "All settings have their defaults."
    return Table("Configuration", note, rows if run.changed else [], texts=True)


def all_settings(run: RunFacts) -> Table:
    """Every setting."""
    rows = [["setting", "value"], *([name, value_text(value)] for name, value in run.settings.items())]
    return Table("All settings", "", rows, texts=True, folded=True)


def environment(start: StartFacts) -> Table:
    """The model and the machine, in words."""
    rows = [["", ""], *([name, text] for name, text in {**start.described, **start.environment}.items())]
    return Table("Environment", "Of the process that began the run, or resumed it last.", rows, texts=True, folded=True)


def results(runs: Mapping[str, RunFacts]) -> Table:
    """What came of each run, and what it cost."""
    names = ["run", "method", "rounds", "frozen", "tuned", "worst domain", "time", "FLOPs", "uploaded", "downloaded"]
    rows = [names]
    for name, run in runs.items():
        scores = [_NOTHING] * 3
        if run.has_ended:
            low = worst(run.tuned)
            scores = [percent(average(run.frozen)), percent(average(run.tuned)), f"{percent(run.tuned[low])} ({low})"]
        totals, costs = run.totals, [_NOTHING] * 3
        if totals is not None:
            costs = [flops_text(totals.flops), bytes_text(totals.uploaded), bytes_text(totals.downloaded)]
        rows.append([name, run.method, rounds_text(run), *scores, duration_text(run.seconds), *costs])
    if len({run.held_out for run in runs.values()}) > 1:
        for row, kind in zip(rows, ["samples", *(run.held_out for run in runs.values())], strict=True):
            row.insert(3, kind)
    note = "Accuracies are averages over the domains. Costs are counted, of all clients and rounds."
    return Table("Results", note, rows)


def measures_of_runs(runs: Mapping[str, RunFacts]) -> list[Table]:
    """The measures beside the accuracy of each run, on average over the domains; no table if no run has any."""
    found = {name: run.summary.get("measures", {}) for name, run in runs.items()}
    every = list(dict.fromkeys(measure for of_run in found.values() for measure in of_run))
    kinds = {run.held_out for run in runs.values()}
    held_out = kinds.pop() if len(kinds) == 1 else "held-out"
    rows = [["run", *(measure_name(measure, held_out) for measure in every), "best round"]]
    for name, of_run in found.items():
        values = [[of_run.get(measure, {}).get(f"average_{when}") for when in _WHEN] for measure in every]
        best = runs[name].best
        where = _NOTHING if best is None else f"{best.number:,} (by {measure_name(best.measure, runs[name].held_out)})"
        rows.append([name, *(change_text(measure, *pair) for measure, pair in zip(every, values, strict=True)), where])
    note = "Averages over the domains, of the frozen model and after tuning."
    return [Table("Measures", note, rows)] if every else []


def differences(runs: Mapping[str, RunFacts]) -> Table:
    """The settings that are not the same in all runs."""
    every = dict.fromkeys(name for run in runs.values() for name in run.settings)
    rows = [["setting", *runs]]
    for name in every:
        values = [value_text(run.settings[name]) if name in run.settings else _NOTHING for run in runs.values()]
        if len(set(values)) > 1 and name not in LOCATION_SETTINGS:
            rows.append([name, *values])
    note = "Settings that are not the same in all runs." if len(rows) > 1 else "All runs have the same settings."
    return Table("Configuration", note, rows if len(rows) > 1 else [], texts=True)


def value_text(value: Any) -> str:
    """A setting's value as YAML has it in a line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

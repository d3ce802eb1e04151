"""What came of a run, in sentences and in the numbers to see first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean

from fedra_engine.federation.averages import average
from fedra_engine.federation.rising_loss import BeforeAndAfter, loss_warnings
from fedra_engine.report.charts import training_counts
from fedra_engine.report.facts import RunFacts, worst
from fedra_engine.report.marks import runs_text
from fedra_engine.runtime.errors import count_of, first_few
from fedra_engine.runtime.measure_text import change_text, measure_name, percent
from fedra_engine.runtime.tables import bytes_text, duration_text, flops_text

_MOST_NAMED = 12
"""Names in a sentence."""


def verdict(run: RunFacts) -> str:
    """What tuning was worth: on average, on the worst domain, and where it did harm."""
    if not run.has_ended:
        return f"This run has not ended: {rounds_text(run)} rounds are trained."
    before, after, low = average(run.frozen), average(run.tuned), worst(run.tuned)
    points = round(100 * (after - before), 1)
    figure = f"the average accuracy{'' if run.held_out == 'test' else f' on {run.held_out} samples'}"
    parts = [f"Tuning left {figure} at {percent(after)}."]
    if points:
        did = f"{'raised' if points > 0 else 'lowered'} {figure} by {abs(points):.1f} points"
        parts = [f"Tuning {did}, from {percent(before)} for the frozen model to {percent(after)}."]
    if len(run.tuned) > 1:
        parts.append(f"The worst domain, {low}, is at {percent(run.tuned[low])} (frozen: {percent(run.frozen[low])}).")
        lost = {name: round(100 * (run.frozen[name] - tuned), 1) for name, tuned in run.tuned.items()}
        named = [f"{name} ({of:.1f})" for name, of in sorted(lost.items(), key=lambda each: -each[1]) if of > 0]
        if named:
            parts.append(f"{count_of(len(named), 'domain')} lost points: {first_few(named, _MOST_NAMED)}.")
    return " ".join(parts)


def cards(run: RunFacts) -> dict[str, str]:
    """Numbers to see first, by title."""
    found = dict[str, str]()
    if run.has_ended:
        low = worst(run.tuned)
        found["average accuracy"] = change_text("accuracy", average(run.frozen), average(run.tuned))
        if (best := run.best) is not None:
            after_best = (
                f"average accuracy after round {best.number:,}, the best by {measure_name(best.measure, run.held_out)}"
            )
            found[after_best] = percent(average(best.accuracy))
        found[f"worst domain, {low}"] = change_text("accuracy", run.frozen[low], run.tuned[low])
    for name, of in run.summary.get("measures", {}).items():
        found[f"average {measure_name(name, run.held_out)}"] = change_text(
            name, of["average_frozen"], of["average_tuned"]
        )
    found["rounds"] = rounds_text(run)
    if run.rounds:
        updates = mean(each.participants for each in run.rounds)
        found["updates a round"] = f"{updates:.1f}".removesuffix(".0") if updates < 100 else f"{updates:,.0f}"
        found["time of all rounds"] = duration_text(run.seconds)
    if run.totals is not None:
        found["training FLOPs"] = flops_text(run.totals.flops)
        found["uploaded"], found["downloaded"] = bytes_text(run.totals.uploaded), bytes_text(run.totals.downloaded)
    if run.start is not None and run.start.kinds:
        found["memory of a client, at most"] = bytes_text(max(kind.memory for kind in run.start.kinds))
    return found


def warnings(run: RunFacts) -> list[str]:
    """What one must know before trusting the numbers, a sentence each."""
    return [*_of_summary(run), *_of_rounds(run), *(run.start.notes if run.start is not None else [])]


def rounds_text(run: RunFacts) -> str:
    """`12 of 80`."""
    done, planned = len(run.rounds), run.settings.get("rounds", len(run.rounds))
    return f"{done:,}" if done == planned else f"{done:,} of {planned:,}"


def _of_summary(run: RunFacts) -> Iterator[str]:
    summary = run.summary
    if summary.get("caution"):
        yield _sentence(str(summary["caution"]))
    if run.held_out != "test":
        yield f"Accuracies are measured on {run.held_out} samples, not on the test samples."
    if run.has_ended:
        accuracy = BeforeAndAfter(average(run.frozen), average(run.tuned))
        by_round = {number: loss for number, loss in run.measured("test_loss").items() if number > 0}
        yield from loss_warnings(accuracy, _ends(run, "test_loss"), by_round, run.held_out)
    if summary.get("tuned_is"):
        exported = percent(summary["average_exported"])
        yield f"The tuned accuracy is that of {summary['tuned_is']}. The adapter alone has {exported} on average."
    if "stopped" in summary:
        yield _sentence(f"Stopped early: {summary['stopped'] or 'no reason was given'}")


def _ends(run: RunFacts, measure: str) -> BeforeAndAfter:
    """The averages of a measure before and after; NaN where it is not defined."""
    values = (run.summary.get("measures", {}).get(measure, {}).get(f"average_{when}") for when in ("frozen", "tuned"))
    return BeforeAndAfter(*(math.nan if value is None else value for value in values))


def _of_rounds(run: RunFacts) -> Iterator[str]:
    bad, late, dropped = (sum(getattr(each, name) for each in run.rounds) for name in ("bad", "late", "dropped"))
    if bad:
        where, were = [each.number for each in run.rounds if each.bad], "was" if bad == 1 else "were"
        yield f"{count_of(bad, 'update')} {were} left out for values that are not finite, in {_named('round', where)}."
    if late or dropped:
        yield f"{count_of(late, 'update')} arrived too late, and {count_of(dropped, 'participant')} dropped out."
    idle = [each.number for each in run.rounds if each.loss is None]
    if idle:
        yield f"Nobody trained in {count_of(len(idle), 'round')}: {_runs(idle)}."
    never = [block for block, count in enumerate(training_counts(run), 1) if not count]
    if never and any(each.trainers for each in run.rounds):
        yield f"Never trained: {_named('block', never)}."


def _named(thing: str, numbers: Sequence[int]) -> str:
    """`round 4`, `blocks 2–4, 7`."""
    return f"{thing}{'' if len(numbers) == 1 else 's'} {_runs(numbers)}"


def _runs(numbers: Sequence[int]) -> str:
    return first_few(runs_text(numbers).split(", "), _MOST_NAMED)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."

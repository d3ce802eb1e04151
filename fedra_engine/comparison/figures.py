"""Accuracy by round as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedra_engine.comparison.summaries import MethodSummary
from fedra_engine.runtime.errors import printable

_STYLES = ("-", "--", ":", "-.")


def plot_accuracy_by_round(summaries: Sequence[MethodSummary], file: Path) -> None:
    """Draw each method's mean over seeds, averaged over domains, with a band of ± one standard deviation."""
    figure = Figure(figsize=(8, 5), dpi=150)
    axes = figure.subplots()
    colors = list(TABLEAU_COLORS)
    for index, summary in enumerate(summaries):
        color, style = colors[index % len(colors)], _STYLES[index % len(_STYLES)]
        rounds, points = list(summary.curve), list(summary.curve.values())
        means = [100 * point.mean for point in points]
        axes.plot(rounds, means, style, color=color, marker=".", label=printable(summary.label))
        if summary.seeds > 1:
            stds = [100 * (point.std or 0.0) for point in points]
            lower, upper = ([m + sign * s for m, s in zip(means, stds, strict=True)] for sign in (-1, 1))
            axes.fill_between(rounds, lower, upper, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="round", ylabel="average accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for text in legend.get_texts():
        # Between two dollar signs, as regular expressions have them, matplotlib expects a formula.
        text.set_parse_math(False)
    # The picture grows with the legend, whatever the labels' length; the axes keep their size.
    figure.savefig(file, format="png", bbox_inches="tight")

"""Print and plot how the samples are divided among the clients: class × client and domain × client matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedra_engine.callback import Callback, Round
from fedra_engine.callbacks.run_folder import PARTITION
from fedra_engine.experiment import Experiment
from fedra_engine.federation.clients import Clients
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import printable
from fedra_engine.runtime.files import whole_file
from fedra_engine.runtime.stages import Stage
from fedra_engine.runtime.tables import rich_table, table_text

if TYPE_CHECKING:
    from fedra_engine.data.domain_data import DomainData

MOST_PLOTTED = 1000
"""Most clients of a plot."""
MOST_PRINTED = 36
"""Most clients of a table."""
MOST_COLUMNS = 16
"""Most classes or domains of a table."""

Counts = Mapping[str, tuple[NDArray[np.int64], Sequence[str]]]
"""Matrices [names, clients] of training samples by `domain` and, where there are classes, by `class`; with names."""


class PartitionReport(Callback):
    """Prints the partition before a run begins, and plots it after the run's first round."""

    def __init__(self, folder: Path, message: Callable[[str], None]) -> None:
        """Plot into the run's `folder`, and give a table to `message`, if it is small."""
        self._folder, self._message = folder, message
        self._to_plot: Counts | None = None

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        self._to_plot = count_and_print(experiment.train_data, experiment.clients, self._message)

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        # Not before the first round, as importing matplotlib takes a second.
        if self._to_plot is not None:
            with Stage("plotting the partition"):
                plot_partition(self._to_plot, self._folder / PARTITION)
            self._to_plot = None


def count_and_print(train: DomainData, clients: Clients, message: Callable[[str], None]) -> Counts | None:
    """Count the samples, and give the table, if it is small, to `message`.

    Nothing is done for more clients than `MOST_PLOTTED`.
    """
    if len(clients) > MOST_PLOTTED:
        return None
    counts = count_partition(train, clients)
    if len(clients) <= MOST_PRINTED and max(len(names) for _, names in counts.values()) <= MOST_COLUMNS:
        message(partition_text(counts, clients.capacities))
    return counts


def count_partition(train: DomainData, clients: Clients) -> Counts:
    """Count the samples of every client; they are rows of `train`."""

    def counts(of_sample: NDArray[np.int64], names: Sequence[str]) -> tuple[NDArray[np.int64], Sequence[str]]:
        columns = [np.bincount(of_sample[rows], minlength=len(names)) for rows in clients.samples]
        return np.stack(columns, axis=1), names

    found = {"domain": counts(train.domain_of, train.domains)}
    return found if train.labels is None else found | {"class": counts(train.labels, train.classes)}


def partition_text(counts: Counts, capacities: NDArray[np.int64]) -> str:
    """A table with one line per client: domain (or samples of each), capacity, samples, samples of each class."""
    domains, names = counts["domain"]
    labels, classes = counts.get("class", (domains[:0], ()))
    one_domain = bool(((domains > 0).sum(axis=0) <= 1).all())
    rows = [["client", *(["domain"] if one_domain else names), "blocks", "samples", *classes]]
    for client, (of_domain, of_class) in enumerate(zip(domains.T, labels.T, strict=True)):
        cells = [names[int(of_domain.argmax())]] if one_domain else _cells(of_domain)
        rows.append([str(client), *cells, str(capacities[client]), str(of_domain.sum()), *_cells(of_class)])
    return table_text(rich_table(rows, left=(1,) if one_domain else ()))


def plot_partition(counts: Counts, file: Path) -> None:
    """Both matrices as heat maps, as a PNG."""
    # Slow to import.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    clients = counts["domain"][0].shape[1]
    heights = [min(max(len(names), 3), 40) for _, names in counts.values()]
    figure = Figure(figsize=(min(max(0.2 * clients, 6), 16), 0.25 * sum(heights) + 2), layout="constrained")
    for axes, (title, (matrix, names)) in zip(
        figure.subplots(len(counts), height_ratios=heights, squeeze=False)[:, 0], counts.items(), strict=True
    ):
        image = axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0)
        axes.set(xlabel="client", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) <= MOST_COLUMNS:
            # Names may contain dollar signs, between which matplotlib expects a formula.
            axes.set_yticks(range(len(names)), map(printable, names), parse_math=False)
        figure.colorbar(image, ax=axes, label="training samples")
    with whole_file(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _cells(values: NDArray[np.int64]) -> list[str]:
    return [str(value) if value else "·" for value in values]

"""How the samples are divided among the clients: label × client and domain × client matrices, printed and plotted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from fedra_engine.callback import Callback
from fedra_engine.experiment import Experiment
from fedra_engine.federation.clients import Clients
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import printable
from fedra_engine.runtime.files import whole_file
from fedra_engine.runtime.tables import table_text

if TYPE_CHECKING:
    from fedra_engine.data.domain_data import DomainData

_LOG = logging.getLogger(__name__)
PLOT_FILE = "partition.png"
MOST_PLOTTED = 1000
"""Clients above which nothing is counted: a plot could not show them."""
MOST_PRINTED = 36
"""Clients above which the matrices are not printed."""
MOST_COLUMNS = 16
"""Classes or domains above which the matrices are not printed."""


@dataclass(frozen=True)
class PartitionCounts:
    """Training samples of every client by class and by domain.

    Attributes:
        labels: int64 [classes, clients]; None where samples have no class.
        classes: names.
        domains: int64 [domains, clients].
        domain_names: names.
        capacities: int64 [clients].
    """

    labels: NDArray[np.int64] | None
    classes: Sequence[str]
    domains: NDArray[np.int64]
    domain_names: Sequence[str]
    capacities: NDArray[np.int64]


class PartitionReport(Callback):
    """Prints and plots the partition before a run begins."""

    def __init__(self, folder: Path) -> None:
        """Plot into the run's `folder`."""
        self._folder = folder

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        report_partition(experiment.train_data, experiment.clients, self._folder, _LOG.info)


def report_partition(train: DomainData, clients: Clients, folder: Path, message: Callable[[str], None]) -> None:
    """Plot the matrices into `folder`, and print them where they are small; neither beyond `MOST_PLOTTED` clients.

    Args:
        train: what `clients.samples` are rows of.
        clients: of the federation.
        folder: of the run.
        message: called with the printed matrices.
    """
    if len(clients) > MOST_PLOTTED:
        return
    counts = count_partition(train, clients)
    plot_partition(counts, folder / PLOT_FILE)
    columns = max(len(counts.classes), len(counts.domain_names))
    if len(clients) <= MOST_PRINTED and columns <= MOST_COLUMNS:
        message(partition_text(counts))


def count_partition(train: DomainData, clients: Clients) -> PartitionCounts:
    """Count the samples of every client."""

    def counts(of_sample: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.int64]:
        columns = [np.bincount(of_sample[rows], minlength=len(names)) for rows in clients.samples]
        return np.stack(columns, axis=1)

    return PartitionCounts(
        labels=None if train.labels is None else counts(train.labels, train.classes),
        classes=train.classes,
        domains=counts(train.domain_of, train.domains),
        domain_names=train.domains,
        capacities=clients.capacities,
    )


def partition_text(counts: PartitionCounts) -> str:
    """A table with one line per client: its domains, capacity and samples, and how many of each class these are."""
    one_domain = bool(((counts.domains > 0).sum(axis=0) <= 1).all())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("client", justify="right")
    for name in ("domain",) if one_domain else counts.domain_names:
        table.add_column(printable(name), justify="left" if one_domain else "right")
    for name in ("blocks", "samples", *counts.classes):
        table.add_column(printable(name), justify="right")
    for client in range(counts.domains.shape[1]):
        of_domain = counts.domains[:, client]
        cells = [printable(counts.domain_names[int(of_domain.argmax())])] if one_domain else _cells(of_domain)
        labels = [] if counts.labels is None else _cells(counts.labels[:, client])
        table.add_row(str(client), *cells, str(counts.capacities[client]), str(of_domain.sum()), *labels)
    return table_text(table)


def plot_partition(counts: PartitionCounts, file: Path) -> None:
    """Both matrices as heat maps, as a PNG."""
    # Importing it takes long; most of the engine does without.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    matrices = {"domain": (counts.domains, counts.domain_names)}
    if counts.labels is not None:
        matrices["class"] = (counts.labels, counts.classes)
    clients = counts.domains.shape[1]
    heights = [min(max(len(names), 3), 40) for _, names in matrices.values()]
    figure = Figure(figsize=(min(max(0.2 * clients, 6), 16), 0.25 * sum(heights) + 2), layout="constrained")
    for axes, (title, (matrix, names)) in zip(
        figure.subplots(len(matrices), height_ratios=heights, squeeze=False)[:, 0], matrices.items(), strict=True
    ):
        image = axes.imshow(matrix, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0)
        axes.set(xlabel="client", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(names) <= MOST_COLUMNS:
            # A name may have dollar signs, which are no formula.
            axes.set_yticks(range(len(names)), map(printable, names), parse_math=False)
        figure.colorbar(image, ax=axes, label="training samples")
    with whole_file(file) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def _cells(values: NDArray[np.int64]) -> list[str]:
    return [str(value) if value else "·" for value in values]

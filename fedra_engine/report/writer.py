"""The callback that leaves a run's report: what only the experiment knows at the start, the page at the end."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedra_engine.callback import Callback, Outcome
from fedra_engine.callbacks.description import describe
from fedra_engine.callbacks.partition_report import count_partition
from fedra_engine.costs.model import ClientCosts
from fedra_engine.experiment import Experiment
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.records import MOST_ALLOCATED
from fedra_engine.models.sharding import is_sharded
from fedra_engine.models.state import GlobalState
from fedra_engine.report.facts import ClientKind, StartFacts
from fedra_engine.report.page import write_report
from fedra_engine.runtime.errors import one_line
from fedra_engine.runtime.measure_text import is_share
from fedra_engine.runtime.stages import Stage

_LOG = logging.getLogger(__name__)
_LIBRARIES = ("fedra-engine", "torch", "transformers", "peft", "numpy")


class ReportWriter(Callback):
    """Writes `facts.json` before a run and `report.html` after it. If that fails, it logs a warning."""

    def __init__(self, folder: Path) -> None:
        """Write into the run's `folder`."""
        self._folder = folder

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        self._try(lambda: start_facts(experiment).write(self._folder))

    def on_end(self, experiment: Experiment, state: GlobalState, outcome: Outcome) -> None:
        with Stage("writing the report"):
            self._try(lambda: write_report(self._folder))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        # Whatever it is, what has been trained is worth more.
        except Exception as error:
            _LOG.warning("report: %s; the run does without it", one_line(error))


def start_facts(experiment: Experiment) -> StartFacts:
    """What the report of a run needs and only its experiment knows."""
    clients, described, notes = experiment.clients, describe(experiment), list[str]()
    ranks = clients.ranks_or(experiment.foundation.adapter_layout.rank)
    everyone, classes, counts = np.arange(len(clients)), list[str](), np.zeros((0, 0), dtype=np.int64)
    if len(everyone) > MOST_ALLOCATED:
        notes.append(f"Of more than {MOST_ALLOCATED:,} clients, neither labels nor participation are shown.")
        everyone = everyone[:0]
    else:
        found = count_partition(experiment.train_data, clients).get("class")
        counts, classes = (counts, classes) if found is None else (found[0], list(found[1]))
    kinds = list[ClientKind]()
    try:
        if is_sharded(experiment.foundation.model):
            # The passes that measure a block would need all processes.
            notes.append("Costs were not counted, as the model is sharded.")
        else:
            with Stage("counting the clients' costs"):
                kinds = client_kinds(experiment)
    # The passes may need more memory than training, and a model of the user's may refuse them.
    except Exception as error:
        notes.append(f"Costs were not counted: {one_line(error)}")
    # The number of lanes was chosen for the memory that was free before.
    torch.cuda.empty_cache()
    return StartFacts(
        blocks=experiment.foundation.depth,
        described=described,
        client_domains=[experiment.group_name(int(clients.domains[client])) for client in everyone],
        client_capacities=clients.capacities[everyone].tolist(),
        client_ranks=ranks[everyone].tolist(),
        client_samples=clients.sample_counts(everyone).tolist(),
        classes=classes,
        label_counts=counts.tolist(),
        kinds=kinds,
        notes=notes,
        environment=environment(),
        shares=[name for name in experiment.evaluator.measures if is_share(name)],
    )


def client_kinds(experiment: Experiment) -> list[ClientKind]:
    """Costs of the first round by kind of client, those that hold most blocks first.

    All clients are counted as if they took part; of very many, some that are spread evenly.
    """
    count = len(experiment.clients)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_ALLOCATED)).astype(np.int64))
    assignment = experiment.assign(chosen, 0)
    holding = np.flatnonzero(assignment.held.any(axis=1))
    chosen, assignment = chosen[holding], assignment.select(holding)
    costs = experiment.cost_model.count(experiment.clients, chosen, assignment, experiment.method)
    ranks = experiment.clients.ranks_or(experiment.foundation.adapter_layout.rank)
    return _by_kind(assignment, ranks[chosen], costs)


def environment() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes, and the machine."""
    found = {"Python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["system"] = f"{platform.system()} on {platform.machine()}"
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _by_kind(assignment: Assignment, ranks: NDArray[np.int64], costs: ClientCosts) -> list[ClientKind]:
    kinds = np.stack([assignment.held.sum(axis=1), assignment.trained_blocks.sum(axis=1), ranks], axis=1)
    found = list[ClientKind]()
    for held, trained, rank in np.unique(kinds, axis=0)[::-1].tolist():
        of_kind = costs.select(np.flatnonzero((kinds == (held, trained, rank)).all(axis=1)))
        # That of the client that needs most.
        most = of_kind.select(np.array([of_kind.memory.argmax()]))
        found.append(
            ClientKind(
                held=held,
                trained=trained,
                rank=rank,
                clients=len(of_kind.blocks),
                flops=float(of_kind.flops.mean()),
                uploaded=float(of_kind.uploaded.mean()),
                downloaded=float(of_kind.downloaded.mean()),
                frozen_memory=float(most.frozen_memory[0]),
                trained_memory=float(most.trained_memory[0]),
                activation_memory=float(most.activation_memory[0]),
            )
        )
    return found

"""Show what a configuration would train, on which clients and at what cost, without training it."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.description import samples_text
from fedra_engine.callbacks.partition_report import MOST_COLUMNS, MOST_PRINTED, count_partition, partition_text
from fedra_engine.config import ExperimentConfig
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.federation.allocation import measure_coverage
from fedra_engine.federation.work import LocalWork
from fedra_engine.methods.allocators import USES
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.sharding import parameter_count
from fedra_engine.runtime.errors import count_of
from fedra_engine.runtime.tables import PlainConsole, bytes_text, duration_text, flops_text, rich_table, table_text
from fedra_engine.studies.measure import time_step

_MOST_ALLOCATED = 2_000_000
"""Clients, over all rounds, whose blocks are drawn for the coverage: some seconds."""


def print_probe(
    config: ExperimentConfig,
    device: torch.device,
    console: PlainConsole | None = None,
    *,
    quiet: bool = False,
    log_level: int = logging.INFO,
) -> None:
    """Print the model's parts, the costs by capacity, the clients, and the time of a round.

    While the experiment is built, messages as severe as `log_level` are printed unless it is to be `quiet`.
    """
    console = PlainConsole() if console is None else console
    with Console(None, console, config=config, level=log_level, results_only=quiet):
        experiment = build_experiment(config, device)
    samples = f"samples: {samples_text(experiment)}"
    parts = [_parts_table(experiment), _costs_table(experiment), f"{_clients_table(experiment)}\n{samples}"]
    if len(experiment.clients) <= MOST_PRINTED and len(experiment.train_data.classes) <= MOST_COLUMNS:
        counts = count_partition(experiment.train_data, experiment.clients)
        parts.append(partition_text(counts, experiment.clients.capacities))
    parts.append(_coverage_text(experiment))
    if (devices := experiment.round_work(0)[2]) is not None:
        parts.append(
            f"on the clients' devices the first round takes {devices.seconds:.3g} s: {devices.arrived.sum():,} updates "
            f"arrive, {devices.late:,} are late, {devices.dropped:,} participants drop out"
        )
    console.print("\n\n".join(parts), "\ntiming a local step …\n", sep="\n", soft_wrap=True)
    step = time_step(experiment)
    console.print(
        f"one step of {count_of(step.clients, 'client')} with {step.samples} samples took {step.seconds:.3g} s: about "
        f"{duration_text(step.round_seconds)} a round, {duration_text(config.rounds * step.round_seconds)} for "
        f"{config.rounds} rounds, without evaluation",
        soft_wrap=True,
    )


def _parts_table(experiment: Experiment) -> str:
    config, foundation = experiment.config, experiment.foundation
    blocks, layout, head = foundation.blocks, foundation.adapter_layout, foundation.head
    bias = "" if head.bias is None else ", with bias"
    shared = "" if foundation.task.trains_head else ", frozen and shared"
    quantized = "" if config.model.load_in is None else f", blocks in {config.model.load_in}"
    kind, size, trained = type(blocks[0]).__name__, parameter_count(blocks[0]), foundation.head_layout.trained_size
    adapted = int(foundation.adapted.sum())
    total = adapted * layout.size + trained
    where = "per block" if adapted == foundation.depth else f"in each of {count_of(adapted, 'block')}"
    rows = [
        ["part", "found"],
        [
            "model",
            f"{config.model.path}: {type(foundation.model).__name__}, {experiment.choices['precision']}{quantized}",
        ],
        ["attention", experiment.choices["attention"]],
        *(["stem", f"{name} ({count:,} parameters)"] for name, count in _outside_blocks(foundation)),
        ["blocks", f"{foundation.block_path}: {len(blocks)} × {kind} ({size:,} parameters each)"],
        *(["adapter", f"{t.path}: {t.in_features} → {t.out_features}, rank {t.rank}"] for t in layout.targets),
        ["head", f"{foundation.head_path}: {head.in_features} → {head.out_features}{bias}{shared}"],
        ["trainable", f"{layout.size:,} parameters {where} and {trained:,} of the head: {total:,}"],
    ]
    return table_text(rich_table(rows, left=(0, 1)))


def _outside_blocks(foundation: Foundation) -> list[tuple[str, int]]:
    """Names and parameters of the outermost modules that contain neither blocks nor head."""
    known = (foundation.block_path, foundation.head_path)

    def contains_known(path: str) -> bool:
        return not path or any(other.startswith(f"{path}.") for other in known)

    return [
        (path, size)
        for path, module in foundation.model.named_modules(remove_duplicate=False)
        if contains_known(path.rpartition(".")[0]) and not contains_known(path) and path not in known
        if (size := parameter_count(module))
    ]


def _costs_table(experiment: Experiment) -> str:
    """One row for each capacity and rank among the clients; memory is the sum of the three columns after it."""
    clients = experiment.clients
    ranks = clients.ranks_or(experiment.foundation.adapter_layout.rank)
    kinds, examples = np.unique(np.stack([clients.capacities, ranks]), axis=1, return_index=True)
    names = ["capacity", "rank", "blocks", "trainable", "uploaded", "downloaded", "memory"]
    rows = [[*names, "frozen", "trained", "activations", "FLOPs per sample"]]
    # Of the first round; in other rounds, methods may assign other numbers of blocks.
    order = np.argsort(examples)
    assignment = experiment.assign(examples[order], 0)
    cost = experiment.cost_model.count(clients, examples[order], assignment, experiment.method).select(
        np.argsort(order)
    )
    memory = [cost.memory, cost.frozen_memory, cost.trained_memory, cost.activation_memory]
    sizes = [cost.uploaded, cost.downloaded, *memory]
    for row, (capacity, rank) in enumerate(kinds.T.tolist()):
        bytes_texts, flops = [bytes_text(size[row]) for size in sizes], flops_text(cost.sample_flops[row])
        rows.append(
            [str(capacity), str(rank), str(int(cost.blocks[row])), f"{cost.trained[row]:,.0f}", *bytes_texts, flops]
        )
    return table_text(rich_table(rows, left=()))


def _clients_table(experiment: Experiment) -> str:
    """One row for each domain and capacity."""
    config, clients = experiment.config, experiment.clients
    counts = clients.sample_counts(np.arange(len(clients)))
    steps = LocalWork(clients, np.arange(len(clients)), experiment.training, config.seed, 0, 0.0).steps()
    rows = [["domain", "capacity", "clients", "samples", "samples per client", "steps per round"]]
    for index, capacity in np.unique(np.stack([clients.domains, clients.capacities]), axis=1).T.tolist():
        members = (clients.domains == index) & (clients.capacities == capacity)
        ranges = [_range(values[members]) for values in (counts, steps)]
        totals = [f"{members.sum():,}", f"{counts[members].sum():,}"]
        rows.append([experiment.group_name(index), str(capacity), *totals, *ranges])
    return table_text(rich_table(rows))


def _range(values: NDArray[np.int64]) -> str:
    """`5–7`, or `5` if all are equal."""
    least, most = values.min(), values.max()
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def _coverage_text(experiment: Experiment) -> str:
    """How the participants whose updates arrive cover the adapted blocks of the global model over the rounds."""
    rounds = min(experiment.config.rounds, max(1, _MOST_ALLOCATED // len(experiment.clients)))
    of_model, adapted = experiment.method.evaluated_model().blocks, experiment.foundation.adapted
    blocks = of_model[adapted[of_model]]
    counted = "all blocks" if len(blocks) == len(of_model) else f"all {len(blocks)} blocks with adapters"
    found = measure_coverage(experiment.round_work(round)[1].trained_blocks[:, blocks] for round in range(rounds))
    learns = "movement" in USES.get(experiment.config.method.allocation or "", ())
    return (
        f"coverage over {count_of(rounds, 'round')}: {counted} have a holder in {100 * found.complete:.1f} % of them; "
        f"a block has {found.holders.mean():.2f} holders on average, the rarest {found.holders.min():.2f}; the longest "
        f"time that one goes without is {count_of(found.longest_gap, 'round')}"
        f"{' (before anything is learnt of the blocks)' if learns else ''}"
    )

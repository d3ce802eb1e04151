"""What a configuration would train, by whom and at what cost, without training it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from rich.table import Table
from torch import nn

from fedra_engine.callbacks.console import Console
from fedra_engine.callbacks.partition_report import MOST_COLUMNS, MOST_PRINTED, count_partition, partition_text
from fedra_engine.config import ExperimentConfig
from fedra_engine.experiment import Experiment, build_experiment
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.runtime.tables import PlainConsole, table_text
from fedra_engine.studies.step_timing import time_step


def print_probe(config: ExperimentConfig, device: torch.device, console: PlainConsole | None = None) -> None:
    """Print (to stdout if there is no `console`) the parts found, the costs by capacity, the clients and the time.

    Raises:
        InputError: something in the configuration cannot be used.
    """
    console = PlainConsole() if console is None else console
    with Console(None, console):
        experiment = build_experiment(config, device)
    parts = [_parts_table(experiment), _costs_table(experiment), _clients_table(experiment)]
    if len(experiment.clients) <= MOST_PRINTED and len(experiment.train_data.classes) <= MOST_COLUMNS:
        parts.append(partition_text(count_partition(experiment.train_data, experiment.clients)))
    if (devices := experiment.round_work(0)[2]) is not None:
        parts.append(
            f"on the clients' devices the first round takes {devices.seconds:.3g} s: {devices.arrived.sum():,} updates "
            f"arrive, {devices.late:,} are late, {devices.dropped:,} participants drop out"
        )
    console.print("\n\n".join(parts), "\ntiming a local step …\n", sep="\n", soft_wrap=True)
    step = time_step(experiment)
    console.print(
        f"one step of {step.clients} clients with {step.samples} samples took {step.seconds:.3g} s: about "
        f"{_duration(step.round_seconds)} a round, {_duration(config.rounds * step.round_seconds)} for {config.rounds} "
        "rounds, without evaluation",
        soft_wrap=True,
    )


def _parts_table(experiment: Experiment) -> str:
    config, foundation = experiment.config, experiment.foundation
    table = Table("part", "found", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    blocks, layout, head = foundation.blocks, foundation.adapter_layout, foundation.head
    table.add_row("model", f"{config.model.path}: {type(foundation.model).__name__}, {config.model.dtype}")
    for name, size in _outside_blocks(foundation):
        table.add_row("stem", f"{name} ({size:,} parameters)")
    kind = type(blocks[0]).__name__
    table.add_row("blocks", f"{foundation.block_path}: {len(blocks)} × {kind} ({_size(blocks[0]):,} parameters each)")
    for target in layout.targets:
        table.add_row("adapter", f"{target.path}: {target.in_features} → {target.out_features}, rank {layout.rank}")
    bias = "" if head.bias is None else ", with bias"
    shared = "" if foundation.task.trains_head else ", frozen and shared"
    table.add_row("head", f"{foundation.head_path}: {head.in_features} → {head.out_features}{bias}{shared}")
    trained = foundation.head_layout.trained_size
    total = foundation.depth * layout.size + trained
    table.add_row("trainable", f"{layout.size:,} parameters per block and {trained:,} of the head: {total:,}")
    return table_text(table)


def _outside_blocks(foundation: Foundation) -> list[tuple[str, int]]:
    """Names and sizes of the modules before and after the blocks, the head left out, as far up as they can be named."""
    found: list[tuple[str, int]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path in (foundation.block_path, foundation.head_path):
                continue
            if any(other.startswith(f"{path}.") for other in (foundation.block_path, foundation.head_path)):
                visit(child, f"{path}.")
            elif size := _size(child):
                found.append((path, size))

    visit(foundation.model, "")
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _costs_table(experiment: Experiment) -> str:
    """One row for each capacity and rank that some client has; memory is the sum of the three columns after it."""
    config, clients = experiment.config, experiment.clients
    ranks = np.full(len(clients), config.lora.rank) if clients.ranks is None else clients.ranks
    kinds, examples = np.unique(np.stack([clients.capacities, ranks]), axis=1, return_index=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = ["capacity", "rank", "blocks", "trainable", "uploaded", "downloaded", "memory"]
    for name in (*names, "frozen", "trained", "activations", "FLOPs per sample"):
        table.add_column(name, justify="right")
    # Of the first round; methods may give other numbers of blocks in other rounds.
    order = np.argsort(examples)
    assignment = experiment.method.assign(examples[order], 0)
    cost = experiment.cost_model.count(clients, examples[order], assignment, experiment.method).select(
        np.argsort(order)
    )
    memory = [cost.memory, cost.frozen_memory, cost.trained_memory, cost.activation_memory]
    sizes = [cost.uploaded, cost.downloaded, *memory]
    for row, (capacity, rank) in enumerate(kinds.T.tolist()):
        table.add_row(
            *(str(value) for value in (capacity, rank, int(cost.blocks[row]))),
            f"{cost.trained[row]:,.0f}",
            *(_scaled(size[row], 1024, (" B", " KiB", " MiB", " GiB", " TiB")) for size in sizes),
            _scaled(cost.sample_flops[row], 1000, ("", " k", " M", " G", " T", " P")),
        )
    return table_text(table)


def _clients_table(experiment: Experiment) -> str:
    """One row for each domain and capacity."""
    config, clients = experiment.config, experiment.clients
    counts = clients.sample_counts(np.arange(len(clients)))
    steps = LocalWork(clients, np.arange(len(clients)), experiment.training, config.seed, 0, 0.0).steps()
    table = Table("domain", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("capacity", "clients", "samples", "samples per client", "steps per round"):
        table.add_column(name, justify="right")
    for index, capacity in np.unique(np.stack([clients.domains, clients.capacities]), axis=1).T.tolist():
        members = (clients.domains == index) & (clients.capacities == capacity)
        table.add_row(
            experiment.group_name(index),
            str(capacity),
            f"{members.sum():,}",
            f"{counts[members].sum():,}",
            f"{counts[members].min():,}–{counts[members].max():,}",
            f"{steps[members].min():,}–{steps[members].max():,}",
        )
    return table_text(table)


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """`value` in the unit that leaves the fewest digits before the point; units grow by `base`."""
    power = 0
    while value >= base and power + 1 < len(units):
        value, power = value / base, power + 1
    return f"{value:.3g}{units[power]}" if value < 1000 else f"{value:.0f}{units[power]}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

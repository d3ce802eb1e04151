"""Run folders with the files of a finished run, written without training."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.report.facts import ClientKind, StartFacts

DOMAINS = ("clean", "noisy", "edges")
CAPACITIES = (4, 2, 1)
DEPTH = 4
CLIENTS = 6
FROZEN = {"clean": 0.9, "noisy": 0.4, "edges": 0.2}
TUNED = {"clean": 0.85, "noisy": 0.7, "edges": 0.5}


def start_facts(**changes: Any) -> StartFacts:
    """Six clients, two in each of three domains, which can hold 4, 2 and 1 of 4 blocks."""
    domains = [name for name in DOMAINS for _ in range(2)]
    capacities = [count for count in CAPACITIES for _ in range(2)]
    kinds = [
        ClientKind(
            held=count,
            trained=count,
            rank=8,
            clients=2,
            flops=1e6 * count,
            uploaded=1000.0 * count,
            downloaded=2000.0 * count,
            frozen_memory=1e5,
            trained_memory=1e4 * count,
            activation_memory=1e4 * count,
        )
        for count in CAPACITIES
    ]
    facts = StartFacts(
        blocks=DEPTH,
        described={"model": "ViTForImageClassification, 4 blocks", "clients": "6 in 3 domains"},
        client_domains=domains,
        client_capacities=capacities,
        client_ranks=[8] * CLIENTS,
        client_samples=[10] * CLIENTS,
        classes=["0", "1"],
        label_counts=[[7, 3, 5, 5, 0, 10], [3, 7, 5, 5, 10, 0]],
        kinds=kinds,
        notes=[],
        environment={"torch": "2.13.0", "device": "cpu"},
    )
    return replace(facts, **changes)


def records(rounds: int, evaluate_every: int = 2) -> list[dict[str, Any]]:
    """A record a round: one client of each domain takes part, and draws as many blocks as it can hold."""
    draws, made = random.Random(0), list[dict[str, Any]]()
    for round in range(rounds):
        clients = {2 * domain + draws.randrange(2): count for domain, count in enumerate(CAPACITIES)}
        held = {str(client): sorted(draws.sample(range(DEPTH), count)) for client, count in clients.items()}
        made.append(
            {
                "round": round,
                "participants": len(held),
                "samples": 30,
                "loss": 2.5 / (round + 1),
                "lr": 0.01,
                "blocks_held": len({block for blocks in held.values() for block in blocks}),
                "seconds": 0.5 + 0.1 * draws.random(),
                "allocation": held,
            }
        )
        if (round + 1) % evaluate_every == 0:
            done = (round + 1) / rounds
            accuracy = {name: FROZEN[name] + done * (TUNED[name] - FROZEN[name]) for name in DOMAINS}
            losses = {"clean": 1 - done, "noisy": 2 - done, "edges": None if done == 1 else 3 - done}
            made[-1] |= {"accuracy": accuracy, "test_loss": losses, "macro_f1": dict.fromkeys(DOMAINS, 0.25 * done)}
    return made


def summary(rounds: int, **changes: Any) -> dict[str, Any]:
    """What a run of so many rounds leaves in `summary.json`."""
    return {
        "rounds": rounds,
        "frozen": FROZEN,
        "tuned": TUNED,
        "average_exported": sum(TUNED.values()) / 3,
        "tuned_is": None,
        "measured_on": "test samples",
        "caution": None,
        "measures": {
            "test_loss": {"frozen": dict.fromkeys(DOMAINS, 2.5), "average_frozen": 2.5}
            | {"tuned": {"clean": 0.5, "noisy": 1.25, "edges": None}, "average_tuned": None},
            "macro_f1": {"frozen": dict.fromkeys(DOMAINS, 0.125), "average_frozen": 0.125}
            | {"tuned": dict.fromkeys(DOMAINS, 0.25), "average_tuned": 0.25},
        },
        "block_changes": [0.5, 1.0, 1.5, 2.0],
        **changes,
    }


def large_run(parent: Path) -> Path:
    """Write a run of 250 rounds, each of 1,000 participants that hold 4 to 12 of 12 blocks, and return its folder."""
    draws, depth, clients, rounds = random.Random(0), 12, 1000, 250
    domains = [("art", "cartoon", "photo", "sketch")[client % 4] for client in range(clients)]
    capacities = [(12, 8, 6, 4)[client % 4] for client in range(clients)]
    # Drawing for every round anew would take most of the time.
    drawn = [
        {str(client): sorted(draws.sample(range(depth), count)) for client, count in enumerate(capacities)}
        for _ in range(10)
    ]
    accuracy = dict.fromkeys(sorted(set(domains)), 1 / 3)
    line = {**records(1)[0], "participants": clients, "accuracy": accuracy, "macro_f1": accuracy}
    lines = [
        {**line, "round": number, "seconds": draws.random(), "allocation": draws.choice(drawn)}
        for number in range(rounds)
    ]
    facts = start_facts(
        blocks=depth,
        client_domains=domains,
        client_capacities=capacities,
        client_ranks=[8] * clients,
        client_samples=[28] * clients,
        classes=[str(label) for label in range(10)],
        label_counts=[[draws.randrange(9) for _ in range(clients)] for _ in range(10)],
    )
    told = {"frozen": accuracy, "tuned": accuracy, "measures": {}, "block_changes": [1.0] * depth}
    return write_run(parent, "large", rounds=rounds, lines=lines, facts=facts, of_summary=told)


def write_run(
    parent: Path,
    name: str = "run",
    *,
    rounds: int = 6,
    changes: dict[str, Any] | None = None,
    of_summary: dict[str, Any] | None = None,
    facts: StartFacts | None = None,
    lines: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a finished run of `rounds` rounds into `<parent>/<name>`. Returns its folder.

    Args:
        changes: fields of the configuration.
        of_summary: values of summary.json.
        facts: what was known at the start; `start_facts()` if not given.
        lines: the records; `records(rounds)` if not given.
    """
    config = replace(ExperimentConfig(rounds=rounds, name=name, output_dir=str(parent)), **(changes or {}))
    folder = RunFolder.create(config)
    folder.append_metrics(*(records(rounds) if lines is None else lines))
    folder.write_summary(summary(rounds, **(of_summary or {})))
    (start_facts() if facts is None else facts).write(folder.path)
    return folder.path

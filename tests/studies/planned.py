"""Small comparisons for tests."""

from __future__ import annotations

from pathlib import Path

from fedra_engine.commands.compare import parse_comparison
from fedra_engine.studies.plan import PlannedRun

SMALL = [
    "--rounds=2",
    "--evaluate_every=1",
    "--data.domains=[clean,noisy]",
    "--data.clients_per_domain=2",
    "--clients.capacities=[4,2]",
    "--training.batch_size=6",
    "--training.max_local_steps=2",
]
"""The embedded experiment, cut short."""


def planned_run(output_dir: Path, method: str = "fedra", *options: str) -> PlannedRun:
    """One small run; `method` is an entry of `--methods`."""
    given = [f"--output_dir={output_dir}", f"--methods={method}", "--control=false"]
    (run,) = parse_comparison([*SMALL, *given, *options]).runs
    return run

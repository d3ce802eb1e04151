"""Whether two configurations are the same, as far as it matters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from fedra_engine.config import ExperimentConfig

RESULT_NEUTRAL = frozenset({"name", "output_dir", "evaluate_every", "execution"})
"""Fields of an experiment that do not change what its rounds compute, but for rounding."""


def differences(
    found: Any, expected: Any, irrelevant: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of the fields in which two configurations differ, with both values; but for irrelevant ones."""
    for field in fields(found):
        name, one, other = f"{prefix}{field.name}", getattr(found, field.name), getattr(expected, field.name)
        if name in irrelevant:
            continue
        if is_dataclass(one):
            yield from differences(one, other, irrelevant, f"{name}.")
        elif one != other:
            yield name, one, other


def setting_digest(config: ExperimentConfig) -> str:
    """A digest of all options that decide what a round computes; a run may go on only with those it began with."""
    values = asdict(config)
    for name in RESULT_NEUTRAL:
        del values[name]
    # A run may be given more rounds, unless the rate of those before depends on how many there are.
    if config.training.lr_schedule == "constant":
        del values["rounds"]
    # What is found there counts, not where; see `fingerprint`.
    del values["data"]["root"], values["model"]["path"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

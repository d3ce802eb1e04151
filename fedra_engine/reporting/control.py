"""The full-depth control of the embedded experiment, from a recorded run of `method.name alllarge`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from importlib.resources import files
from typing import Any

from fedra_engine.config import ExperimentConfig

_RECORD = "digits_control.json"
_IRRELEVANT = {"method", "execution", "evaluate_every", "name", "output_dir", "trace"}
"""Fields that say nothing about what the control had to learn, or that differ by its being the control."""


def recorded_control(config: ExperimentConfig) -> dict[str, float] | None:
    """The control's accuracy per domain, if it was recorded with these data, model, training, rounds and seed."""
    record = json.loads((files("fedra_engine") / "assets" / _RECORD).read_text())
    return record["tuned"] if record["setting"] == control_setting(config) else None


def control_setting(config: ExperimentConfig) -> dict[str, Any]:
    """The part of a configuration that a run and its control have in common, as JSON has it."""
    content = asdict(config)
    shared = {field.name: content[field.name] for field in fields(config) if field.name not in _IRRELEVANT}
    # Capacities do not bind the control.
    shared["clients"].pop("capacities")
    return json.loads(json.dumps(shared))

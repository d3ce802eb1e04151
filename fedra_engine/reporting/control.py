"""The full-depth control of the embedded experiment, from recorded runs of `method.name alllarge`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fedra_engine.config import ExperimentConfig
from fedra_engine.config_comparison import RESULT_NEUTRAL
from fedra_engine.errors import InputError
from fedra_engine.reporting.run_folder import RunFolder

_RECORDS = Path(__file__).parent.parent / "assets" / "controls.json"
_IRRELEVANT = RESULT_NEUTRAL | {"method", "trace"}
"""Fields that say nothing about what the control had to learn, or differ by its being the control."""


def recorded_control(config: ExperimentConfig) -> dict[str, float] | None:
    """The control's accuracy per domain, if it was recorded with these data, model, training, rounds and seed."""
    setting = _setting(config)
    return next((record["accuracy"] for record in _read() if record["setting"] == setting), None)


def record_control(config: ExperimentConfig, folder: RunFolder) -> None:
    """Keep the accuracies of a finished run as the control of its setting.

    Raises:
        InputError: the run is not one of `alllarge`, or has not finished all its rounds.
    """
    if config.method.name != "alllarge":
        raise InputError(f"method.name: found {config.method.name} in {folder.path}, expected alllarge")
    if not folder.summary_file.is_file():
        raise InputError(f"run: found no {folder.summary_file}, expected a finished run")
    summary = json.loads(folder.summary_file.read_text())
    if summary["rounds"] != config.rounds:
        raise InputError(
            f"{folder.summary_file}: found {summary['rounds']} rounds, expected the {config.rounds} of "
            f"{folder.config_file.name} (a finished run)"
        )
    setting = _setting(config)
    others = [record for record in _read() if record["setting"] != setting]
    _RECORDS.write_text(json.dumps([*others, {"setting": setting, "accuracy": summary["tuned"]}], indent=1) + "\n")


def _read() -> list[dict[str, Any]]:
    """All records; fields that their settings lack came later, and had their default values."""
    defaults = _setting(ExperimentConfig())
    records: list[dict[str, Any]] = json.loads(_RECORDS.read_text())
    return [record | {"setting": _completed(record["setting"], defaults)} for record in records]


def _completed(setting: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    completed = defaults | setting
    for name, default in defaults.items():
        if isinstance(default, dict):
            completed[name] = _completed(setting.get(name, {}), default)
    return completed


def _setting(config: ExperimentConfig) -> dict[str, Any]:
    """The part of a configuration that a run and its control have in common, as JSON has it."""
    content = asdict(config)
    shared = {field.name: content[field.name] for field in fields(config) if field.name not in _IRRELEVANT}
    shared["weighting"] = config.method.weighting
    # Capacities do not bind the control.
    shared["clients"].pop("capacities")
    setting: dict[str, Any] = json.loads(json.dumps(shared))
    return setting

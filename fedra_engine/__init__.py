"""Federated LoRA tuning of transformer foundation models by many heterogeneous clients, in one layer sweep.

    from fedra_engine import ExperimentConfig, simulate

    result = simulate(ExperimentConfig(rounds=20))
    result.accuracy, result.history, result.save_adapter("adapter")

Names are imported when they are first used: importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedra_engine.callback import Callback, Evaluation, Outcome, Round, Stop, Update
    from fedra_engine.callbacks.early_stopping import EarlyStopping
    from fedra_engine.callbacks.keep_best import KeepBest
    from fedra_engine.config import (
        ClientsConfig,
        ColumnsConfig,
        DataConfig,
        DeviceConfig,
        EarlyStoppingConfig,
        ExecutionConfig,
        ExperimentConfig,
        LoraConfig,
        MethodConfig,
        ModelConfig,
        ServerConfig,
        TrainingConfig,
    )
    from fedra_engine.config.options import option
    from fedra_engine.data.partition import register_partitioner
    from fedra_engine.data.sources import register_source
    from fedra_engine.execution.metrics import Metric, Predictions, register_metric
    from fedra_engine.experiment import Experiment
    from fedra_engine.federation.assignment import Assignment
    from fedra_engine.federation.local_terms import LocalTerm
    from fedra_engine.methods.allocators import register_allocator
    from fedra_engine.methods.base import Method, register_method
    from fedra_engine.run import Result, build, load_run, simulate
    from fedra_engine.runtime.errors import InputError

__all__ = [  # noqa: RUF022 (what one looks for first comes first)
    "simulate",
    "build",
    "load_run",
    "ExperimentConfig",
    "ClientsConfig",
    "ColumnsConfig",
    "DataConfig",
    "DeviceConfig",
    "EarlyStoppingConfig",
    "ExecutionConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "ServerConfig",
    "TrainingConfig",
    "Experiment",
    "Result",
    "Callback",
    "Update",
    "Round",
    "Evaluation",
    "Outcome",
    "Stop",
    "EarlyStopping",
    "KeepBest",
    "Method",
    "Assignment",
    "LocalTerm",
    "Metric",
    "Predictions",
    "option",
    "register_method",
    "register_source",
    "register_partitioner",
    "register_allocator",
    "register_metric",
    "InputError",
]

_PLACES = {
    "callback": ("Callback", "Evaluation", "Outcome", "Round", "Stop", "Update"),
    "callbacks.early_stopping": ("EarlyStopping",),
    "callbacks.keep_best": ("KeepBest",),
    "config": tuple(name for name in __all__ if name.endswith("Config")),
    "config.options": ("option",),
    "data.partition": ("register_partitioner",),
    "data.sources": ("register_source",),
    "execution.metrics": ("Metric", "Predictions", "register_metric"),
    "experiment": ("Experiment",),
    "federation.assignment": ("Assignment",),
    "federation.local_terms": ("LocalTerm",),
    "methods.allocators": ("register_allocator",),
    "methods.base": ("Method", "register_method"),
    "run": ("Result", "build", "load_run", "simulate"),
    "runtime.errors": ("InputError",),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fedra-engine")
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'fedra_engine' has no attribute {name!r}")
    return getattr(import_module(f"fedra_engine.{_PLACE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])

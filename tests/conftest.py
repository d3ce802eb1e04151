"""Every test runs offline, on one thread and with the same random examples each time."""

import os
import random
import signal
from collections.abc import Iterator
from typing import Any

# Read when the libraries are imported, so they come before any of the imports below.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("fedra", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fedra")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a generator of its own is the same in every run and in every order of tests."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def own_names() -> Iterator[None]:
    """For tests that register things: names and options that a configuration may have are afterwards as before."""
    from fedra_engine.config import MethodConfig
    from fedra_engine.config.fields import TYPES
    from fedra_engine.config.options import CHOICES
    from fedra_engine.data.partition import PARTITIONERS
    from fedra_engine.data.sources import SOURCES
    from fedra_engine.execution.metrics import METRICS
    from fedra_engine.methods.allocators import ALLOCATORS, USES
    from fedra_engine.methods.registry import METHODS
    from fedra_engine.runtime.measure_text import SHARES

    tables: tuple[Any, ...] = (METHODS, ALLOCATORS, USES, SOURCES, PARTITIONERS, METRICS, SHARES)
    kept = [(table, table.copy()) for table in tables]
    names = [(choice, [*choice.names], [*choice.registered]) for choice in CHOICES.values()]
    attributes, annotations = dict(vars(MethodConfig)), dict(MethodConfig.__annotations__)
    yield
    for table, before in kept:
        table.clear()
        table.update(before)
    for choice, all_names, registered in names:
        choice.names, choice.registered = all_names, registered
    if MethodConfig.__annotations__ != annotations:
        # A field that is left over would be in the configurations of other tests, and of the processes they start.
        for name in vars(MethodConfig).keys() - attributes.keys():
            delattr(MethodConfig, name)
        for name in attributes.keys() - {"__dict__", "__weakref__", "__annotations__"}:
            setattr(MethodConfig, name, attributes[name])
        MethodConfig.__annotations__.clear()
        MethodConfig.__annotations__.update(annotations)
        del TYPES[MethodConfig]


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many short runs: no plot of the partition, no script in the report, the same data are read once."""
    from fedra_engine import inputs
    from fedra_engine.callbacks import partition_report
    from fedra_engine.report import page
    from fedra_engine.runtime.files import write_whole

    read = inputs.load_source

    def load_source(config: Any, seed: int) -> Any:
        key = repr((config, seed))
        if key not in _SOURCES:
            _SOURCES[key] = read(config, seed)
        return _SOURCES[key]

    monkeypatch.setattr(inputs, "load_source", load_source)
    monkeypatch.setattr(page, "javascript", lambda: "")
    monkeypatch.setattr(partition_report, "plot_partition", lambda counts, file: write_whole(file, b"plot"))


_SOURCES: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """What a launcher that ran in this process does on signals is not to stay."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

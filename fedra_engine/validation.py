"""What the values of a configuration must be, as far as the configuration alone shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from fedra_engine.config import ClientsConfig, ExperimentConfig
from fedra_engine.errors import InputError


@dataclass(frozen=True)
class Range:
    """Values that a number may have, and their description for messages."""

    description: str
    contains: Callable[[float], bool]


COUNT = Range("a whole number from 1 up", lambda value: value >= 1)
NATURAL = Range("a whole number from 0 up", lambda value: value >= 0)
PIXELS = Range("a whole number from 1 to 4096", lambda value: 1 <= value <= 4096)
RANK = Range("a whole number from 1 to 128", lambda value: 1 <= value <= 128)
"""What the kernels can keep on chip."""
POSITIVE = Range("a finite number above 0", lambda value: 0 < value < math.inf)
NON_NEGATIVE = Range("a finite number from 0 up", lambda value: 0 <= value < math.inf)
FRACTION = Range("a number between 0 and 1, both excluded", lambda value: 0 < value < 1)
SHARE = Range("a number above 0 and at most 1", lambda value: 0 < value <= 1)
PROBABILITY = Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
DECAY = Range("a number from 0 to below 1", lambda value: 0 <= value < 1)

RANGES = {
    "rounds": COUNT,
    "seed": NATURAL,
    "evaluate_every": COUNT,
    "data.classes": COUNT,
    "data.image_size": PIXELS,
    "data.max_length": COUNT,
    "data.crop_scale": SHARE,
    "data.test_fraction": FRACTION,
    "data.clients_per_domain": COUNT,
    "data.clients": COUNT,
    "data.dirichlet_alpha": POSITIVE,
    "data.shards_per_client": COUNT,
    "data.quantity_sigma": NON_NEGATIVE,
    "data.samples_per_client": COUNT,
    "data.min_samples": COUNT,
    "lora.rank": RANK,
    "lora.alpha": POSITIVE,
    "lora.dropout": DECAY,
    "method.inclusivefl.momentum": DECAY,
    "method.depthfl.exit_every": COUNT,
    "method.depthfl.ramp_up_rounds": COUNT,
    "method.fedhello.fisher_every": COUNT,
    "method.fedhello.fisher_samples": COUNT,
    "method.hetlora.keep_ratio": SHARE,
    "method.hetlora.penalty": NON_NEGATIVE,
    "method.lorafair.weight": NON_NEGATIVE,
    "method.lorafair.steps": COUNT,
    "method.lorafair.lr": POSITIVE,
    "server.lr": POSITIVE,
    "server.betas": DECAY,
    "server.tau": POSITIVE,
    "clients.capacities": COUNT,
    "clients.ranks": COUNT,
    "clients.participants": COUNT,
    "clients.deadline": POSITIVE,
    "training.lr": POSITIVE,
    "training.momentum": DECAY,
    "training.betas": DECAY,
    "training.eps": POSITIVE,
    "training.weight_decay": NON_NEGATIVE,
    "training.proximal_mu": NON_NEGATIVE,
    "training.clip_norm": POSITIVE,
    "training.batch_size": COUNT,
    "training.local_epochs": COUNT,
    "training.max_local_steps": COUNT,
    "execution.lanes": COUNT,
}
"""Every numeric field; of a list or tuple, each entry."""

DEVICE_RANGES = {
    "compute": POSITIVE,
    "upload": POSITIVE,
    "download": POSITIVE,
    "memory": POSITIVE,
    "availability": SHARE,
    "dropout": PROBABILITY,
    "variation": NON_NEGATIVE,
}
"""Every field of an entry of `clients.devices`."""


def validate(config: ExperimentConfig) -> None:
    """Check what needs nothing but the configuration.

    Raises:
        InputError: the first value that cannot be used.
    """
    for field, allowed in RANGES.items():
        value: Any = reduce(getattr, field.split("."), config)
        entries = value if isinstance(value, list | tuple) else [value]
        for entry in entries:
            if entry not in (None, "auto", "memory") and not allowed.contains(entry):
                raise InputError(f"{field}: found {entry}, expected {allowed.description}")
    _check_names(config)
    if config.method.allocation == "reference" and config.seed >= 2**32:
        raise InputError(
            f"seed: found {config.seed} with method.allocation reference, whose legacy NumPy stream takes 32 bits, "
            f"expected a whole number from 0 to {2**32 - 1}"
        )
    _check_data(config)
    _check_target_modules(config.lora.target_modules)
    _check_devices(config.clients)
    if config.execution.checkpoint_blocks and config.execution.executor != "sweep":
        raise InputError(
            f"execution.checkpoint_blocks: found true with execution.executor {config.execution.executor}, expected "
            "false, or the executor sweep"
        )
    if config.trace and config.lora.dropout > 0:
        raise InputError(f"trace: found true with lora.dropout {config.lora.dropout}, expected lora.dropout 0")
    if config.trace and config.data.augmentation != "none":
        raise InputError(f"trace: found true with data.augmentation {config.data.augmentation}, expected none")
    if not config.clients.capacities:
        raise InputError("clients.capacities: found an empty list, expected one entry, or one for each domain")


def _check_names(config: ExperimentConfig) -> None:
    if config.name is not None and (config.name in ("", ".", "..") or "/" in config.name):
        raise InputError(f"name: found {config.name!r}, expected the name of one folder in output_dir")
    for field, value in (("output_dir", config.output_dir), ("model.path", config.model.path)):
        if not value:
            raise InputError(f"{field}: found an empty text, expected a path")


def check_method(config: ExperimentConfig) -> None:
    """Check whether the method can work with the other options.

    Raises:
        InputError: it cannot.
    """
    server, name = config.server, config.method.name
    reasons = {
        "flora": "the method writes the rest of each mean into the model",
        "fedexlora": "the method writes the rest of each mean into the model",
        "flexlora": "factors from an SVD have another basis every round, so nothing lies between two of them",
    }
    if name in reasons and (server.optimizer != "fedavg" or server.rate != 1):
        raise InputError(
            f"server: found optimizer {server.optimizer} with lr {server.rate:g} and method.name {name}, expected "
            f"fedavg with lr 1 ({reasons[name]})"
        )


def _check_data(config: ExperimentConfig) -> None:
    data = config.data
    if data.source != "digits" and not data.root:
        raise InputError(f"data.root: found none with data.source {data.source}, expected where its samples are")
    if data.source == "digits" and data.root is not None:
        raise InputError(f"data.root: found {data.root!r} with data.source digits, expected another data.source")
    if data.prompt is not None and data.source != "causal_lm":
        raise InputError(f"data.prompt: found one with data.source {data.source}, expected data.source causal_lm")
    if data.clients is not None and data.partition in ("domain", "natural"):
        raise InputError(
            f"data.clients: found {data.clients} with data.partition {data.partition}, expected null there, or one of "
            "the partitions iid, dirichlet, shards, quantity and bootstrap"
        )
    repeated = [domain for domain in data.domains if data.domains.count(domain) > 1]
    if repeated:
        raise InputError(f"data.domains: found {repeated[0]!r} more than once, expected every domain once")


def _check_devices(clients: ClientsConfig) -> None:
    for index, device in enumerate(clients.devices):
        for field, allowed in DEVICE_RANGES.items():
            value = getattr(device, field)
            if value is not None and not allowed.contains(value):
                raise InputError(f"clients.devices[{index}].{field}: found {value}, expected {allowed.description}")
        if clients.capacities == "memory" and device.memory is None:
            raise InputError(
                f"clients.devices[{index}].memory: found null with clients.capacities memory, expected GiB"
            )
    if not clients.devices and clients.capacities == "memory":
        raise InputError("clients.capacities: found memory with no clients.devices, expected devices and their memory")
    if not clients.devices and clients.deadline is not None:
        raise InputError(
            f"clients.deadline: found {clients.deadline:g} with no clients.devices, expected devices, which take time"
        )
    if clients.capacities == "memory" and clients.capacity_schedule == "drawn":
        raise InputError(
            "clients.capacity_schedule: found drawn with clients.capacities memory, expected fixed (a client keeps its "
            "device)"
        )


def _check_target_modules(target_modules: list[str] | str) -> None:
    if not target_modules:
        raise InputError("lora.target_modules: found nothing, expected name endings or a regular expression")
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise InputError(
                f"lora.target_modules: found {target_modules!r} ({error}), expected a regular expression"
            ) from error

"""What a run's results follow from, as digests: it goes on only with what it began with."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedra_engine.config import ExperimentConfig
from fedra_engine.data.domain_data import DomainData
from fedra_engine.data.partition import BootstrapSamples
from fedra_engine.data.samples import Samples
from fedra_engine.experiment import Experiment
from fedra_engine.federation.clients import Clients
from fedra_engine.models.sharding import gathered
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash

Fingerprint = Mapping[str, str]
"""Hex digests by part of an experiment."""

RESULT_NEUTRAL = frozenset({"name", "output_dir", "evaluate_every", "execution"})
"""Fields of an experiment that do not change what its rounds compute, but for rounding."""

_PARTS = {
    "setting": (
        "config.yaml",
        "settings",
        "the same but for evaluate_every, execution, paths and, with a constant training.lr_schedule, rounds",
    ),
    "names": ("data", "domains or classes", "the same names in the same order"),
    "training": ("data", "training samples", "the same, prepared in the same way"),
    "test": ("data", "test samples", "the same, prepared in the same way"),
    "model": ("model.path", "weights or settings of the model", "the same"),
    "clients": ("clients", "clients", "the same samples, capacities, ranks and devices of each"),
}
"""Every part, in the order in which they are compared: where it comes from, its name, and what is expected of it."""


def fingerprint(experiment: Experiment) -> Fingerprint:
    """Digests of all that decides what the rounds of a newly built experiment compute and its evaluations measure.

    The state before the first round follows from the rest, to the last bit only on equal hardware. All processes of a
    job that shards its model must call this together. A gigabyte of weights takes about a second.
    """
    data = experiment.train_data
    return {
        "setting": setting_digest(experiment.config),
        "names": _digest([json.dumps([experiment.domains, data.classes])]),
        "training": _digest(_of_samples(experiment.train_samples, data)),
        "test": _digest(_of_samples(experiment.test_samples, data)),
        "model": _digest(_of_model(experiment.foundation.model)),
        "clients": _digest(_of_clients(experiment.clients)),
    }


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


def check_fingerprint(found: Fingerprint, expected: Fingerprint, whose: str | Path) -> None:
    """Check that every part of `found` is as in `expected`, the fingerprint of a run folder or of another process.

    Raises:
        InputError: one is not; says which.
    """
    for part, (field, name, wanted) in _PARTS.items():
        if part in found and found[part] != expected.get(part):
            raise InputError(f"{field}: found other {name} than {whose} began with, expected {wanted}")


def _of_samples(samples: Samples, data: DomainData) -> Iterable[str | bytes]:
    yield samples.digest()
    yield samples.domains.numpy().tobytes()
    # What language models are to learn is part of their texts.
    if data.labels is not None:
        yield samples.labels.numpy().tobytes()


def _of_model(model: Any) -> Iterable[str]:
    """The settings of a transformers `model` that are not usual, and every tensor that its files may hold."""
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in _SAYS_NOTHING}
    yield json.dumps([type(model).__name__, settings], sort_keys=True, default=str)
    stored = set(model.state_dict())
    for path, module in model.named_modules():
        with gathered(module):
            for name, tensor in (*module.named_parameters(path, recurse=False), *module.named_buffers(path, False)):
                if name in stored:
                    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(content)}"


_SAYS_NOTHING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id")
"""Settings of a model that do not change what it computes, or that other parts have."""


def _of_clients(clients: Clients) -> Iterable[bytes]:
    for values in (clients.domains, clients.capacities, clients.ranks):
        yield b"" if values is None else np.ascontiguousarray(values).tobytes()
    if clients.devices is not None:
        yield repr(clients.devices.profiles).encode() + np.ascontiguousarray(clients.devices.of_client).tobytes()
    # Drawing takes long; what they are drawn from is known by now.
    if not isinstance(clients.samples, BootstrapSamples):
        for rows in clients.samples:
            yield rows.tobytes()


def _digest(parts: Iterable[str | bytes]) -> str:
    """Of the `parts`, and of where each of them ends."""
    digest = content_hash()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()

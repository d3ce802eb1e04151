"""Digests of everything that a run's results depend on: a run goes on only if they are the same."""

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
from fedra_engine.methods.allocators import USES
from fedra_engine.models.quantization import has_quantized_weight, scales_of
from fedra_engine.models.sharding import gathered
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import content_hash

Fingerprint = Mapping[str, str]
"""By part of an experiment: hex digests, or a short option itself."""

RESULT_NEUTRAL = frozenset({"name", "output_dir", "evaluate_every", "report_to", "execution"})
"""Fields of an experiment that do not change what its rounds compute, except for rounding."""

_CHOOSING = ("early_stopping", "keep_best")
"""Fields that choose after which round a run ends, or what is kept, and do not change what a round computes."""

_PARTS = {
    "setting": (
        "config.yaml",
        "settings",
        "the same but for evaluate_every, report_to, early_stopping, execution, paths and, unless "
        "training.lr_schedule or method.allocation depends on their number, rounds",
    ),
    "keep_best": ("keep_best", "rules for the best round", "the same measure, or null to keep none"),
    "names": ("data", "domains or classes", "the same names in the same order"),
    "training": ("data", "training samples", "the same, prepared in the same way"),
    "test": ("data", "test samples", "the same, prepared in the same way"),
    "model": ("model.path", "weights or settings of the model", "the same"),
    "clients": ("clients", "clients", "the same samples, capacities, ranks and devices of each"),
    "server": ("method.stand_in_data", "samples for stand-ins", "the same, prepared in the same way"),
}
"""Field, name and expectation of every part, for messages; in the order in which parts are compared."""


def fingerprint(experiment: Experiment) -> Fingerprint:
    """Digests of everything that the rounds and evaluations of a newly built experiment depend on.

    The initial state follows from it. All processes of a job that shards its model must call this together. A gigabyte
    of weights takes about a second.
    """
    data, fit = experiment.train_data, experiment.stand_in_fit
    return {
        **early_fingerprint(experiment.config),
        "names": _digest([json.dumps([experiment.domains, data.classes])]),
        "training": _digest(_of_samples(experiment.train_samples, data)),
        "test": _digest(_of_samples(experiment.test_samples, data)),
        "model": _digest(_of_model(experiment.foundation.model)),
        "clients": _digest(_of_clients(experiment.clients)),
        "server": _digest([] if fit is None else [fit.samples.digest(), fit.rows.tobytes()]),
    }


def early_fingerprint(config: ExperimentConfig) -> Fingerprint:
    """The parts that are known before the experiment is built."""
    # Earlier rounds have not been compared by another measure; without one nothing is compared.
    best = {} if config.keep_best is None else {"keep_best": config.keep_best}
    return {"setting": setting_digest(config), **best}


def setting_digest(config: ExperimentConfig) -> str:
    """Digest of the options that decide what a round computes."""
    values = asdict(config)
    for name in (*RESULT_NEUTRAL, *_CHOOSING):
        del values[name]
    # More rounds may follow, unless something in the earlier ones depends on their number.
    allocation = config.method.allocation or "uniform"
    if config.training.lr_schedule == "constant" and "rounds" not in USES.get(allocation, ()):
        del values["rounds"]
    # What is found there has digests of its own in `fingerprint`.
    del values["data"]["root"], values["model"]["path"], values["method"]["stand_in_data"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_fingerprint(found: Fingerprint, expected: Fingerprint, whose: str | Path) -> None:
    """Raise InputError for the first part of `found` that differs from `expected`, the fingerprint of `whose` run."""
    for part, (field, name, wanted) in _PARTS.items():
        if part in found and found[part] != expected.get(part):
            raise InputError(f"{field}: found other {name} than {whose} began with, expected {wanted}")


def _of_samples(samples: Samples, data: DomainData) -> Iterable[str | bytes]:
    yield samples.digest()
    yield samples.domains.numpy().tobytes()
    # The labels of language models are part of their texts.
    if data.labels is not None:
        yield samples.labels.numpy().tobytes()


def _of_model(model: Any) -> Iterable[str]:
    """The settings of a transformers `model` that differ from the defaults, and every tensor that its files hold."""
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name not in _SAYS_NOTHING}
    yield json.dumps([type(model).__name__, settings], sort_keys=True, default=str)
    stored = set(model.state_dict())
    for path, module in model.named_modules():
        scales = scales_of(module, f"{path}.") if has_quantized_weight(module) else {}
        with gathered(module):
            own = *module.named_parameters(path, recurse=False), *module.named_buffers(path, False)
            for name, tensor in (*own, *scales.items()):
                if name in stored:
                    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(content)}"


_SAYS_NOTHING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "id2label", "label2id")
"""Settings of a model that do not change what it computes, or that other parts contain."""


def _of_clients(clients: Clients) -> Iterable[bytes]:
    for values in (clients.domains, clients.capacities, clients.ranks):
        yield b"" if values is None else np.ascontiguousarray(values).tobytes()
    if clients.devices is not None:
        yield repr(clients.devices.profiles).encode() + np.ascontiguousarray(clients.devices.of_client).tobytes()
    # Drawing them takes long, and what they are drawn from is in the other parts.
    if not isinstance(clients.samples, BootstrapSamples):
        for rows in clients.samples:
            yield rows.tobytes()


def _digest(parts: Iterable[str | bytes]) -> str:
    """Digest of the `parts` and their lengths."""
    digest = content_hash()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()

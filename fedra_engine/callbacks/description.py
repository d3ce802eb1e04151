"""What an experiment is, in a few words: for the console and the report."""

from __future__ import annotations

import torch

from fedra_engine.experiment import Experiment
from fedra_engine.models.sharding import is_sharded, parameter_count
from fedra_engine.runtime.errors import count_of


def describe(experiment: Experiment) -> dict[str, str]:
    """Model, adapters, clients and so on, in words, by title."""
    foundation, device = experiment.foundation, experiment.initial_state.heads.device
    size, adapted = parameter_count(foundation.model), int(foundation.adapted.sum())
    kept = " in shards" if is_sharded(foundation.model) else ""
    targets = ", ".join(target.path for target in foundation.adapter_layout.targets)
    where = "per block" if adapted == foundation.depth else f"in each of {count_of(adapted, 'block')},"
    facts = {
        "model": f"{type(foundation.model).__name__}, {foundation.depth} blocks, {size:,} frozen parameters{kept}",
        "adapters": f"{foundation.adapter_layout.size:,} LoRA parameters {where} on {targets}",
        "head": f"{foundation.head_layout.trained_size:,} parameters",
        "clients": f"{len(experiment.clients)} in {len(experiment.domains)} domains",
        "samples": samples_text(experiment),
        "lanes": str(experiment.executor.lanes),
        "precision": experiment.config.model.dtype,
        "attention": experiment.config.model.attention,
        "blocks": f"{experiment.sweep_model.fused} of {foundation.depth} fused",
        "device": f"cpu, {count_of(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device),
    }
    if experiment.processes.count > 1:
        facts["processes"] = str(experiment.processes.count)
    return facts


def samples_text(experiment: Experiment) -> str:
    """How many samples train, and how many are evaluated: `840 training, 360 test`."""
    held_out = experiment.config.data.held_out
    return f"{len(experiment.train_data):,} training, {len(experiment.test_samples.domains):,} {held_out}"

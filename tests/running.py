"""Run whole experiments in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fedra_engine.callbacks.run_folder import RunFolder
from fedra_engine.config import ExperimentConfig
from fedra_engine.data.samples import Batch, ImageSamples
from fedra_engine.run import run


def small_config(output_dir: Path, **changes: Any) -> ExperimentConfig:
    """The embedded default, cut short and with nothing left to be measured; a dict changes the fields of a group."""
    config = ExperimentConfig(rounds=2, name="run", output_dir=str(output_dir))
    config = replace(config, training=replace(config.training, batch_size=6, max_local_steps=2))
    config = replace(config, model=replace(config.model, attention="sdpa"))
    groups = {name: replace(getattr(config, name), **v) for name, v in changes.items() if isinstance(v, dict)}
    return replace(config, **(changes | groups))


def run_experiment(output_dir: Path, **changes: Any) -> Path:
    """Run an experiment to its end in `output_dir`. Returns the run folder."""
    config = small_config(output_dir, **changes)
    folder = RunFolder.create(config)
    continue_run(config, folder)
    return folder.path


def continue_run(config: ExperimentConfig, folder: RunFolder) -> None:
    """Train the rounds that `folder` does not have yet."""
    run(config, folder, accelerator=Accelerator(cpu=True))


def spoil(put: Callable[[object, str, object], None], clients: Sequence[int], rounds: Sequence[int]) -> None:
    """Make all pixels that these clients train on in these rounds NaN; `put` is `setattr`, or undoes it later."""
    batch = ImageSamples.batch

    def spoilt(self: ImageSamples, rows: Tensor, device: Any, dtype: torch.dtype, draws: Any = None) -> Batch:
        found = batch(self, rows, device, dtype, draws)
        if draws is not None and draws.round in rounds:
            owners = np.repeat(draws.clients, draws.sizes)
            found.inputs["pixel_values"][torch.from_numpy(np.isin(owners, clients))] = torch.nan
        return found

    put(ImageSamples, "batch", spoilt)

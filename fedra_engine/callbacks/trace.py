"""Record rounds so completely that other code can recompute them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save, save_file

from fedra_engine.callback import Callback, Round, Update
from fedra_engine.callbacks.run_folder import TRACE
from fedra_engine.data.samples import Samples
from fedra_engine.experiment import Experiment
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState, adapter_tensors, head_tensors, named_tensors
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import whole_file, writing

_PORTION = 1024


class Trace(Callback):
    """Writes `trace/round_NNNN/`: the allocation, every client's batches, and adapters and heads before and after.

    Each process writes its own clients' updates, and the main one the rest.
    """

    every_process = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder / TRACE

    def on_start(self, experiment: Experiment, state: GlobalState, first_round: int) -> None:
        if not self._folder.parent.is_dir():
            raise InputError(f"trace: found no {self._folder.parent} here, expected a folder that all processes share")
        if first_round == 0 and experiment.processes.is_main:
            self._write_inputs(experiment.train_samples, experiment.foundation)

    def on_update(self, experiment: Experiment, update: Update) -> None:
        """Write `client_<id>.safetensors` for every good update: adapters, named by global block, and heads."""
        folder, foundation = self._of_round(update.round), experiment.foundation
        exits = update.assignment.has_exit.shape[1]
        for _, client, (blocks, adapters, trained, heads) in update.updates.of_good_clients():
            tensors = adapter_tensors(blocks.tolist(), adapters, foundation.adapter_layout)
            tensors |= head_tensors(trained.tolist(), heads, foundation.head_layout, exits=exits)
            _save(tensors, folder / f"client_{client}.safetensors")

    def on_round(self, experiment: Experiment, state: GlobalState, round: Round) -> None:
        """Write the allocation, participants, batches, stand-ins, and the global state before and after the round."""
        if not experiment.processes.is_main:
            return
        folder, foundation = self._of_round(round.metrics.round), experiment.foundation
        np.save(folder / "allocation.npy", round.assignment.held)
        clients, participants = round.work.clients, round.work.participants.tolist()
        facts = [
            {
                "client": client,
                "domain": int(clients.domains[client]),
                "samples": len(clients.samples[client]),
                "capacity": int(clients.capacities[client]),
            }
            for client in participants
        ]
        batches = {str(c): [batch.tolist() for batch in round.work.batches(c)] for c in participants}
        for name, content in (("participants", facts), ("batches", batches)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        for name, whole in (("global_before", round.before), ("global_after", state)):
            tensors = named_tensors(whole, foundation.adapter_layout, foundation.head_layout)
            _save(tensors, folder / f"{name}.safetensors")
        if round.before.stand_ins is not None:
            np.save(folder / "replaced.npy", round.assignment.replaced_blocks)
            _save(round.before.stand_ins._asdict(), folder / "stand_ins.safetensors")

    def _write_inputs(self, samples: Samples, foundation: Foundation) -> None:
        """Write `inputs.safetensors`: the preprocessed training samples and `labels`, first dimension [samples].

        A single input of the model is called `inputs`; several have the model's names.
        """
        rows, cpu = torch.arange(len(samples.domains)), torch.device("cpu")
        portions = [samples.batch(part, cpu, foundation.dtype) for part in rows.split(_PORTION)]
        names = list(portions[0].inputs)
        tensors = {
            "inputs" if len(names) == 1 else name: torch.cat([portion.inputs[name] for portion in portions])
            for name in names
        }
        tensors["labels"] = torch.cat([portion.labels for portion in portions])
        self._folder.mkdir(exist_ok=True)
        with whole_file(self._folder / "inputs.safetensors") as file:
            save_file(tensors, file)

    def _of_round(self, round: int) -> Path:
        folder = self._folder / f"round_{round:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _save(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Write a file without waiting for the disk, as a resumed run writes it again."""
    with writing(target):
        target.write_bytes(save(tensors))

"""Write down a round so completely that somebody else's code can recompute it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save, save_file

from fedra_engine.data.samples import Samples
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.work import ClientUpdates, LocalWork
from fedra_engine.models.foundation import Foundation
from fedra_engine.models.state import GlobalState, adapter_tensors, head_tensors, named_tensors
from fedra_engine.runtime.files import whole_file, writing
from fedra_engine.runtime.processes import Processes

_PORTION = 1024


def write_inputs(folder: Path, samples: Samples, foundation: Foundation) -> None:
    """`trace/inputs.safetensors`: the preprocessed training tensors and `labels`, first dimension [samples].

    A single input of the model is called `inputs`; several have the names that the model gives them.
    """
    device = torch.device("cpu")
    portions = [
        samples.batch(rows, device, foundation.dtype) for rows in torch.arange(len(samples.domains)).split(_PORTION)
    ]
    names = list(portions[0].inputs)
    tensors = {
        "inputs" if len(names) == 1 else name: torch.cat([portion.inputs[name] for portion in portions])
        for name in names
    }
    tensors["labels"] = torch.cat([portion.labels for portion in portions])
    target = folder / "trace" / "inputs.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        save_file(tensors, file)


def _save(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Write a file that a resumed run writes again, so that there is no need to wait for the disk."""
    with writing(target):
        target.write_bytes(save(tensors))


class RoundTrace:
    """`trace/round_NNNN/`: who holds what, every client's batches, and adapters and heads before and after.

    Of several processes each writes its own clients' updates, and the main one the rest.
    """

    def __init__(
        self, folder: Path, foundation: Foundation, work: LocalWork, assignment: Assignment, processes: Processes
    ) -> None:
        self._folder = folder / "trace" / f"round_{work.round:04d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._foundation = foundation
        self._exits = max(len(assignment.exits), 1)
        self._is_main = processes.is_main
        if self._is_main:
            self._write_work(work, assignment)

    def write_state(self, name: str, state: GlobalState) -> None:
        """`<name>.safetensors`: the whole global state."""
        if self._is_main:
            tensors = named_tensors(state, self._foundation.adapter_layout, self._foundation.head_layout)
            _save(tensors, self._folder / f"{name}.safetensors")

    def write_updates(self, updates: ClientUpdates) -> None:
        """`client_<id>.safetensors`: the adapters of the blocks each client held, by global index, and its head.

        Bad updates are left out, as they are of the round.
        """
        for _, client, (blocks, adapters, exits, heads) in updates.of_good_clients():
            tensors = adapter_tensors(blocks.tolist(), adapters, self._foundation.adapter_layout)
            tensors |= head_tensors(exits.tolist(), heads, self._foundation.head_layout, exits=self._exits)
            _save(tensors, self._folder / f"client_{client}.safetensors")

    def _write_work(self, work: LocalWork, assignment: Assignment) -> None:
        np.save(self._folder / "allocation.npy", assignment.held)
        clients = work.clients
        participants = [
            {
                "client": client,
                "domain": int(clients.domains[client]),
                "samples": len(clients.samples[client]),
                "capacity": int(clients.capacities[client]),
            }
            for client in work.participants.tolist()
        ]
        self._write_json("participants", participants)
        self._write_json(
            "batches",
            {str(c): [batch.tolist() for batch in work.batches(c)] for c in work.participants.tolist()},
        )

    def _write_json(self, name: str, content: object) -> None:
        (self._folder / f"{name}.json").write_text(json.dumps(content))

"""What the processes of a test job do with a model in shards, and what one process does with a whole one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from fedra_engine.config import LoraConfig, MethodConfig, ModelConfig
from fedra_engine.execution.evaluation import Evaluator, FisherInformation
from fedra_engine.execution.stand_ins import StandInFit
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_block import SweepBlock
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.loading import load_pretrained
from fedra_engine.models.sharding import Sharding, parameter_count
from fedra_engine.models.state import EvaluatedModel, GlobalState
from fedra_engine.runtime.exit_codes import end, exit_code
from fedra_engine.runtime.processes import Processes, join_job
from tests.tiny import CLASSES, DEPTH, FAMILIES, make_samples
from tests.tiny_federation import SGD

SAMPLE_COUNTS = [6, 3, 7, 1, 4, 5]
HELD = np.array(
    [[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
    dtype=bool,
)
OWNERS = [[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]
"""Which process trains each client, in two rounds. In the first, process 1 has a single client, who holds none of the
first two blocks, while nobody on process 0 holds the last. In the second, process 0 has no client."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    family: str
    dtype: str
    dropout: float = 0.0
    checkpoint_blocks: bool = False
    classes: int = CLASSES
    """Other than `CLASSES`: the classifier is a new one."""
    stand_ins: bool = False


CASES = {
    "vit": Case("vit", "float64", dropout=0.3, classes=CLASSES + 2, stand_ins=True),
    "vit_float32_checkpointed": Case("vit", "float32", checkpoint_blocks=True),
    "distilbert": Case("distilbert", "float64"),
    "gpt2_lm": Case("gpt2_lm", "float64"),
    "gpt2_lm_checkpointed": Case("gpt2_lm", "float64", dropout=0.3, checkpoint_blocks=True, stand_ins=True),
}
"""DistilBERT has a module whose name ends as that of its head. GPT-2 stores its weights as [in, out], and its output
layer shares that of the embedding."""


def main() -> None:
    """`sharding_worker.py <folder> [killed]`: train all cases on the models `<folder>/<family>`.

    Leaves the results in `<folder>/<case>.safetensors`. With `killed`, process 1 dies in the middle of a pass instead.
    """
    folder = Path(sys.argv[1])
    accelerator = join_job()
    processes, sharding = Processes.of(accelerator), Sharding.of(accelerator)
    if sys.argv[2:] == ["killed"] and processes.index == 1:
        register_module_forward_hook(die_in_training)
    for name, case in CASES.items():
        results = Job(folder / case.family, case, processes, sharding).run()
        if processes.is_main:
            save_file(results, folder / f"{name}.safetensors")


def die_in_training(module: nn.Module, inputs: object, output: object) -> None:
    """A hook of all modules: the process dies after a block that it trains with."""
    if isinstance(module, SweepBlock) and torch.is_grad_enabled():
        os.kill(os.getpid(), signal.SIGKILL)


class Job:
    """A federation of six clients on a tiny model."""

    def __init__(self, path: Path, case: Case, processes: Processes, sharding: Sharding | None = None) -> None:
        family = FAMILIES[case.family]
        self._case = case
        self._processes = processes
        self._lora = LoraConfig(rank=3, alpha=6, dropout=case.dropout, target_modules=family.targets)
        classes = None if family.causal_lm else case.classes
        model = load_pretrained(ModelConfig(path=str(path), dtype=case.dtype), classes=classes, sharding=sharding)
        self._foundation = make_foundation(model, self._lora, classes=classes)
        self._samples = make_samples(case.family, sum(SAMPLE_COUNTS))
        self._model = SweepModel(
            self._foundation,
            lambda count: self._samples.inputs(torch.arange(count), CPU, self._foundation.dtype),
            fuse_blocks=False,
            checkpoint_blocks=case.checkpoint_blocks,
            sharding=sharding,
        )
        bounds = pairwise(np.cumsum([0, *SAMPLE_COUNTS]))
        samples = [np.arange(start, end) for start, end in bounds]
        self._clients = Clients(samples, np.zeros(len(samples), dtype=np.int64), HELD.sum(axis=1))
        self._sharded_over = processes if sharding is not None else None

    def run(self) -> dict[str, Tensor]:
        """The global state after each round and what is measured of the last; the same on every process.

        `resident` [processes] is the largest share of the model that a process has between passes, `peak` [processes]
        the largest at the entry to a block.
        """
        foundation, processes = self._foundation, self._processes
        executor = SweepExecutor(
            foundation, self._model, self._samples, self._lora, lanes=2, sharded_over=self._sharded_over
        )
        state = self._initial_state()
        if self._case.stand_ins:
            config = MethodConfig(stand_in="linear", stand_in_rank=4, stand_in_samples=19)
            rows = np.arange(len(self._samples.domains))
            fit = StandInFit(foundation, self._model, self._samples, rows, config, 0, processes)
            state = replace(state, stand_ins=fit(state, round=0))
        results = named(0, state)
        if state.stand_ins is not None:
            results["maps"] = state.stand_ins.down @ state.stand_ins.up
        with watch(foundation) as shares:
            for round, owners in enumerate(OWNERS):
                mine = np.flatnonzero([processes.count == 1 or owner == processes.index for owner in owners])
                aggregator = Aggregator(state)
                for updates in executor.train(*self._work(round, mine), state):
                    aggregator.add(updates)
                processes.all_reduce_(aggregator.sums())
                state = aggregator.result()
                results |= named(round + 1, state)
            results |= self._measure(state)
        for name, values in shares.items():
            results[name] = torch.tensor(processes.all_gather_object(max(values)))
        return results

    def _measure(self, state: GlobalState) -> dict[str, Tensor]:
        evaluator = Evaluator(self._foundation, self._model, self._samples, ["only"], self._processes)
        measured = {
            f"accuracy of {blocks}": evaluator.scores(state, EvaluatedModel(np.array(blocks)))["only"].accuracy
            for blocks in ([0, 1, 2, 3], [0, 2])
        }
        if self._foundation.task.trains_head:
            fisher = FisherInformation(self._foundation, self._model, self._samples, seed=0, processes=self._processes)
            measured["fisher"] = fisher(state, 19, 0)
        measured |= self._foundation.saved_beside
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in measured.items()}

    def _initial_state(self) -> GlobalState:
        foundation = self._foundation
        adapters = initial_adapters(foundation.adapter_layout, DEPTH, seed=0, dtype=foundation.adapter_dtype)
        noise = torch.from_numpy(np.random.default_rng(2).normal(scale=0.1, size=tuple(adapters.shape)))
        return GlobalState(adapters + noise.to(adapters.dtype), foundation.initial_heads())

    def _work(self, round: int, participants: NDArray[np.int64]) -> tuple[LocalWork, Assignment]:
        work = LocalWork(self._clients, participants, SGD, seed=3, round=round, lr=SGD.lr)
        assignment = Assignment(HELD).select(participants)
        return work, assignment.with_stand_ins(np.arange(DEPTH)) if self._case.stand_ins else assignment


def named(round: int, state: GlobalState) -> dict[str, Tensor]:
    """Copies of the tensors after `round` rounds; without stand-ins, whose factors have no sign."""
    tensors = replace(state, stand_ins=None).tensors()
    return {f"{round}.{name}": tensor.clone() for name, tensor in tensors.items()}


@contextmanager
def watch(foundation: Foundation) -> Iterator[dict[str, list[float]]]:
    """Lists of the shares of the model's bytes that this process has: `resident` between passes, `peak` in modules."""
    shares: dict[str, list[float]] = {"resident": [], "peak": []}
    features = SweepModel.features

    def observed(self: SweepModel, *args: Any, **kwargs: Any) -> Tensor:
        shares["resident"].append(resident_share(foundation.model))
        return features(self, *args, **kwargs)

    def observe(*_: object) -> None:
        shares["peak"].append(resident_share(foundation.model))

    hook = register_module_forward_hook(observe)
    SweepModel.features = observed  # type: ignore[method-assign]
    try:
        yield shares
    finally:
        SweepModel.features = features  # type: ignore[method-assign]
        hook.remove()


def resident_share(model: nn.Module) -> float:
    """Bytes of the parameters of `model` in this process's memory, shards included, over those of the whole model."""
    parameters = list(model.parameters())
    tensors = [*(parameter.data for parameter in parameters), *(p.ds_tensor for p in parameters if hasattr(p, "ds_id"))]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values()) / (parameter_count(model) * parameters[0].element_size())


if __name__ == "__main__":
    end(exit_code(main))

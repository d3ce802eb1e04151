"""What every contestant is given: a round's clients, batches, blocks, initial state and hyperparameters.

It is a file of plain tensors, so that no other contestant runs the engine's data or model code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

State = dict[str, Tensor]
"""Trainable tensors by name: `blocks.<block>.<target>.lora_A` and `lora_B`, `head.weight` and `head.bias`."""


@dataclass(frozen=True)
class Work:
    """One round.

    Attributes:
        model: folder of the frozen model, in transformers' format.
        block_path, head_path: of the blocks and of the classifier in it.
        targets: the Linears of a block that have adapters, of this `rank` and `alpha`.
        inputs: the model's keyword arguments, [samples, …], in float32.
        labels: int64 [samples].
        batches: the samples of each local step of each client.
        held: the blocks of each client, ascending.
        state: the global state that clients start from.
        lr, betas, eps, weight_decay: of AdamW, whose state is new in every round.
        clip_norm: largest norm of a client's gradient.
    """

    model: str
    block_path: str
    head_path: str
    targets: list[str]
    rank: int
    alpha: float
    inputs: dict[str, Tensor]
    labels: Tensor
    batches: list[list[Tensor]]
    held: list[list[int]]
    state: State
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float

    def save(self, file: Path) -> None:
        """Write it to `file`."""
        torch.save(asdict(self), file)

    @classmethod
    def load(cls, file: Path) -> Work:
        """Read what `save` wrote."""
        return cls(**torch.load(file, weights_only=True))

    @property
    def clients(self) -> int:
        """How many take part."""
        return len(self.held)

    def names(self, client: int) -> list[str]:
        """Names of the tensors that `client` trains."""
        blocks = {str(block) for block in self.held[client]}
        return [name for name in self.state if not name.startswith("blocks.") or name.split(".")[1] in blocks]


def mean_over_holders(state: State, updates: Iterable[State]) -> State:
    """The mean of every tensor over the `updates` that have it; one that nobody has stays as in `state`."""
    sums: State = {}
    counts: dict[str, int] = {}
    for update in updates:
        for name, value in update.items():
            if name in sums:
                sums[name] += value
                counts[name] += 1
            else:
                sums[name], counts[name] = value.clone(), 1
    return {name: sums[name] / counts[name] if name in sums else value for name, value in state.items()}

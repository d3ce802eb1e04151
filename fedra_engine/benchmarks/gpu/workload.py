"""Synthetic federated rounds on a ViT of random weights, on any device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from fedra_engine.config import LoraConfig, TrainingConfig
from fedra_engine.data.samples import Preprocessing, SampleStore
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import Allocation, uniform_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import make_foundation
from fedra_engine.models.state import GlobalState

CAPACITIES = (12, 10, 8, 6, 4, 3)
"""Blocks that clients can hold, in turn (FedRA, §4)."""


@dataclass(frozen=True)
class VitShape:
    """A ViT, and how many different images its clients see."""

    width: int = 768
    hidden: int = 3072
    depth: int = 12
    heads: int = 12
    image: int = 224
    patch: int = 16
    classes: int = 100
    rank: int = 16
    pool: int = 512

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    def block_flops(self) -> float:
        """FLOPs of one image in one block, forward and backward.

        Frozen products forward and dX, attention forward and twice that backward, low-rank products forward, and
        those of dX and of the factors' gradients.
        """
        widths = self.width * self.width, self.width * self.hidden
        frozen = 2.0 * self.tokens * (4 * widths[0] + 2 * widths[1])
        attention = 4.0 * self.tokens**2 * self.width
        low_rank = 2.0 * self.tokens * self.rank * (8 * self.width + 2 * (self.width + self.hidden))
        return 2 * frozen + 3 * attention + 3 * low_rank


VIT_BASE = VitShape()
SMALL_VIT = VitShape(width=128, hidden=256, depth=4, heads=4, image=32, patch=8, classes=10, rank=8, pool=64)


@dataclass(frozen=True)
class Round:
    """The work of one round."""

    work: LocalWork
    allocation: Allocation
    images_per_client: int


class Workload:
    """A foundation model on a device, images, and executors for them. Adapters on all six Linears of a block."""

    def __init__(
        self, shape: VitShape, device: torch.device, dtype: torch.dtype, *, pixels_on_device: bool = False
    ) -> None:
        self.shape = shape
        self.device = device
        self._lora = LoraConfig(
            rank=shape.rank,
            alpha=float(shape.rank),
            dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        )
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            image_size=shape.image,
            patch_size=shape.patch,
            num_labels=shape.classes,
        )
        model = ViTForImageClassification(config).to(device, dtype)
        self.foundation = make_foundation(model, self._lora, classes=shape.classes)
        adapters = initial_adapters(
            self.foundation.adapter_layout, shape.depth, seed=0, dtype=self.foundation.adapter_dtype
        )
        self.state = GlobalState(adapters.to(device), self.foundation.initial_heads())
        self.samples = self._make_samples(device if pixels_on_device else torch.device("cpu"))
        self.sweep_model = SweepModel(
            self.foundation,
            lambda count: self.samples.inputs(torch.zeros(count, dtype=torch.int64), device, dtype),
            fuse_blocks=device.type != "cpu",
        )

    def round(self, clients: int, *, images: int, steps: int) -> Round:
        """`clients` that take `steps` local steps of `images` images, with FedRA's allocation."""
        rng = np.random.default_rng(1)
        count = images * steps
        samples = [rng.integers(0, self.shape.pool, count) for _ in range(clients)]
        capacities = np.minimum(np.resize(np.array(CAPACITIES), clients), self.shape.depth)
        federation = Clients(samples, np.zeros(clients, dtype=np.int64), capacities)
        training = TrainingConfig(batch_size=images)
        work = LocalWork(federation, np.arange(clients), training, seed=0, round=0, lr=training.lr)
        return Round(work, uniform_allocation(capacities, self.shape.depth, rng), count)

    def sweep(self, lanes: int) -> SweepExecutor:
        """The engine."""
        return SweepExecutor(self.foundation, self.sweep_model, self.samples, self._lora, lanes=lanes)

    def sequential(self) -> SequentialExecutor:
        """One PEFT sub-model after another; its adapters are float32, as PEFT makes them for a bf16 model."""
        return SequentialExecutor(self.foundation, self.samples, self._lora)

    def train(self, executor: Executor, round: Round) -> GlobalState:
        """Train and aggregate one round."""
        aggregator = Aggregator(self.state)
        for updates in executor.train(round.work, Assignment(round.allocation), self.state):
            aggregator.add(updates)
        return aggregator.result()

    def flops(self, round: Round) -> float:
        """FLOPs that the blocks need for a round; embedding and heads are not counted."""
        return float(round.allocation.sum()) * round.images_per_client * self.shape.block_flops()

    def _make_samples(self, device: torch.device) -> SampleStore:
        shape, generator = self.shape, torch.Generator().manual_seed(0)
        size = (shape.pool, 3, shape.image, shape.image)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, shape.classes, (shape.pool,), generator=generator)
        preprocessing = Preprocessing(shape.image, 3, (0.5,) * 3, (0.5,) * 3)
        return SampleStore(pixels.to(device), labels, torch.zeros(shape.pool, dtype=torch.int64), preprocessing)


@dataclass(frozen=True)
class RoundCost:
    """Wall-clock seconds of a round, and the most memory it had allocated (0 on a CPU)."""

    seconds: float
    peak_gigabytes: float


def round_cost(workload: Workload, executor: Executor, round: Round, *, repeats: int = 3) -> RoundCost:
    """The median of `repeats` rounds."""
    device = workload.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        workload.train(executor, round)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return RoundCost(float(np.median(seconds)), peak)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

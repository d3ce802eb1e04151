"""Synthetic federated rounds on a model of random weights, on any device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.gpu.shapes import CAPACITIES, DecoderShape, ModelShape, VitShape
from fedra_engine.config import ExperimentConfig, LoraConfig, TrainingConfig
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.samples import ImageSamples, Samples, StoredRows, TokenSamples
from fedra_engine.execution.executor import Executor
from fedra_engine.execution.sequential import SequentialExecutor
from fedra_engine.execution.step_graph import CudaGraphCapture
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.federation.aggregation import Aggregator
from fedra_engine.federation.allocation import Allocation, uniform_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import make_foundation
from fedra_engine.models.loading import load_pretrained
from fedra_engine.models.state import GlobalState
from fedra_engine.models.structure import ALL_LINEAR

Sweep = TypeVar("Sweep", bound=SweepExecutor)

CPU = torch.device("cpu")
_DIGITS = 10
SGD = TrainingConfig(optimizer="sgd", lr=0.05)
"""For comparisons: AdamW divides by the root of tiny second moments, which magnifies rounding."""


@dataclass(frozen=True)
class Round:
    """The work of one round."""

    work: LocalWork
    allocation: Allocation
    samples_per_client: int


class Workload:
    """A foundation model on a device, samples, and executors for them. Adapters on all Linears of a block."""

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        lora: LoraConfig,
        device: torch.device,
        *,
        training: TrainingConfig | None = None,
        fuse_blocks: bool | None = None,
    ) -> None:
        """A `model` of a `shape`, on `device`; blocks are fused on a GPU unless `fuse_blocks` says otherwise."""
        self.shape = shape
        self.device = device
        self._lora = lora
        self._training = TrainingConfig() if training is None else training
        self.foundation = make_foundation(model, lora, classes=getattr(shape, "classes", None))
        adapters = initial_adapters(
            self.foundation.adapter_layout, shape.depth, seed=0, dtype=self.foundation.adapter_dtype
        )
        self.state = GlobalState(adapters.to(device), self.foundation.initial_heads())
        self.samples = _samples(shape, model)
        self.sweep_model = SweepModel(
            self.foundation,
            # As in training: no text is padded, so no mask is given.
            lambda n: self.samples.batch(torch.zeros(n, dtype=torch.int64), device, self.foundation.dtype).inputs,
            fuse_blocks=device.type != "cpu" if fuse_blocks is None else fuse_blocks,
            # On a CPU something stands in for the GPU, whose kernels are to be measured or compiled.
            whole_blocks=False,
        )

    @classmethod
    def random(
        cls,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        *,
        training: TrainingConfig | None = None,
        fuse_blocks: bool | None = None,
    ) -> Workload:
        """A model of random weights."""
        torch.manual_seed(0)
        with device:
            model = _model(shape).to(dtype)
        lora = LoraConfig(rank=shape.rank, alpha=float(shape.rank), target_modules=ALL_LINEAR)
        return cls(model, shape, lora, device, training=training, fuse_blocks=fuse_blocks)

    @classmethod
    def embedded(cls, device: torch.device, *, fuse_blocks: bool | None = None) -> Workload:
        """The embedded default's model and settings, on random images."""
        config = ExperimentConfig()
        model = load_pretrained(config.model, classes=_DIGITS).to(device)
        found = model.config
        shape = VitShape(
            width=found.hidden_size,
            hidden=found.intermediate_size,
            depth=found.num_hidden_layers,
            heads=found.num_attention_heads,
            image=found.image_size,
            patch=found.patch_size,
            classes=_DIGITS,
            rank=config.lora.rank,
        )
        return cls(model, shape, config.lora, device, training=config.training, fuse_blocks=fuse_blocks)

    def round(self, clients: int, *, samples: int, steps: int, capacities: Sequence[int] = CAPACITIES) -> Round:
        """`clients` of these `capacities`, in turn, that take `steps` local steps of `samples` images or texts.

        They hold what FedRA's allocation gives them, which does not depend on samples and steps.
        """
        rng = np.random.default_rng(1)
        count = samples * steps
        drawn = [rng.integers(0, self.shape.pool, count) for _ in range(clients)]
        depths = np.minimum(np.resize(np.array(capacities), clients), self.shape.depth)
        federation = Clients(drawn, np.zeros(clients, dtype=np.int64), depths)
        training = replace(self._training, batch_size=samples, local_epochs=1, max_local_steps=None)
        work = LocalWork(federation, np.arange(clients), training, seed=0, round=0, lr=training.lr)
        return Round(work, uniform_allocation(depths, self.shape.depth, np.random.default_rng(1)), count)

    def sweep(self, lanes: int, *, graphs: bool = False) -> SweepExecutor:
        """The engine, with `graphs` as CUDA graphs."""
        executor = self.sweep_by(SweepExecutor, lanes)
        executor.capture = partial(CudaGraphCapture, self.device) if graphs else None
        return executor

    def sweep_by(self, executor: type[Sweep], lanes: int) -> Sweep:
        """The engine, as a class of its own."""
        return executor(self.foundation, self.sweep_model, self.samples, self._lora, lanes=lanes)

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
        return float(round.allocation.sum()) * round.samples_per_client * self.shape.block_flops()


def _model(shape: ModelShape) -> PreTrainedModel:
    if isinstance(shape, VitShape):
        config = ViTConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            image_size=shape.image,
            patch_size=shape.patch,
            num_labels=shape.classes,
        )
        return ViTForImageClassification(config)
    assert isinstance(shape, DecoderShape)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=shape.length,
        )
    )


def _samples(shape: ModelShape, model: PreTrainedModel) -> Samples:
    """Random images or texts, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    domains = torch.zeros(shape.pool, dtype=torch.int64)
    if isinstance(shape, DecoderShape):
        ids = torch.randint(shape.vocabulary, (shape.pool, shape.length), generator=generator, dtype=torch.int32)
        every = torch.arange(shape.pool)
        return TokenSamples(
            StoredRows([ids]), every, torch.full_like(every, shape.length), torch.zeros_like(every), domains, None
        )
    assert isinstance(shape, VitShape)
    channels = model.config.num_channels
    size = (shape.pool, channels, shape.image, shape.image)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, shape.classes, (shape.pool,), generator=generator)
    preprocessing = Preprocessing(shape.image, channels, (0.5,) * channels, (0.5,) * channels)
    return ImageSamples(StoredRows([pixels]), labels, domains, preprocessing)


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

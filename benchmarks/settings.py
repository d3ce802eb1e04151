"""The settings in which executors are measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from fedra_engine.config import ExperimentConfig, LoraConfig, TrainingConfig
from fedra_engine.data.preprocessing import Preprocessing
from fedra_engine.data.samples import ImageSamples, Samples, StoredRows
from fedra_engine.execution.lanes import LanePool
from fedra_engine.execution.sweep import SweepExecutor
from fedra_engine.execution.sweep_model import SweepModel
from fedra_engine.experiment import build_experiment
from fedra_engine.federation.allocation import uniform_allocation
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.clients import Clients
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.adapters import initial_adapters
from fedra_engine.models.foundation import Foundation, make_foundation
from fedra_engine.models.state import GlobalState

CPU = torch.device("cpu")
CAPACITIES = np.array([12, 10, 8, 6, 4, 3])
_CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """One round's work on one model."""

    name: str
    foundation: Foundation
    samples: Samples
    sweep_model: SweepModel
    lora: LoraConfig
    lanes: int
    work: LocalWork
    assignment: Assignment
    state: GlobalState

    def sweep(self) -> SweepExecutor:
        """The engine."""
        return SweepExecutor(self.foundation, self.sweep_model, self.samples, self.lora, lanes=self.lanes)

    def lane_pool(self) -> LanePool:
        """The round's lanes, before anything is trained."""
        return LanePool(self.work, self.assignment, self.state, self.foundation, lanes=self.lanes)


def tiny_vit(dtype: torch.dtype = torch.float32) -> Setting:
    """32 clients × 4 batches × 8 samples on a ViT of 12 blocks, width 192, 17 tokens, random weights.

    In bfloat16 with `eager` attention, as torch's fused kernel is slow in it on a CPU.
    """
    torch.manual_seed(0)
    shape = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=8,
        patch_size=2,
        num_channels=3,
        num_labels=_CLASSES,
        attn_implementation="sdpa" if dtype == torch.float32 else "eager",
    )
    lora = LoraConfig()
    foundation = make_foundation(ViTForImageClassification(shape).to(dtype), lora, classes=_CLASSES)
    name = "tiny ViT, FedRA, 32 clients × 4 × 8" + ("" if dtype == torch.float32 else ", bfloat16")
    return _synthetic(name, foundation, lora, _pixels(shape, 32 * 8 * 4), 32, 8, lanes=32)


def single_samples(config: ExperimentConfig) -> Setting:
    """256 clients × 1 batch × 1 sample, on the embedded model."""
    experiment = build_experiment(config, CPU)
    lora = replace(config.lora, dropout=0.0)
    pixels = _pixels(experiment.foundation.model.config, 256)
    name = "embedded model, FedRA, 256 clients × 1 × 1"
    return _synthetic(name, experiment.foundation, lora, pixels, 256, 1, lanes=128)


def embedded_default(config: ExperimentConfig) -> Setting:
    """The first round of the embedded default, as configured."""
    experiment = build_experiment(config, CPU)
    foundation = experiment.foundation
    work, assignment, _ = experiment.round_work(0)
    return Setting(
        name="embedded default, one round",
        foundation=foundation,
        samples=experiment.train_samples,
        sweep_model=_sweep_model(foundation, experiment.train_samples),
        lora=config.lora,
        lanes=experiment.executor.lanes,
        work=work,
        assignment=assignment,
        state=experiment.initial_state,
    )


def _synthetic(
    name: str,
    foundation: Foundation,
    lora: LoraConfig,
    pixels: Tensor,
    clients: int,
    batch: int,
    *,
    lanes: int,
) -> Setting:
    """`clients` with equal shares of `pixels` [samples, channels, size, size], each used once, and random labels."""
    rng = np.random.default_rng(0)
    count, channels, size = len(pixels), pixels.shape[1], pixels.shape[2]
    samples = ImageSamples(
        pixels=StoredRows([pixels]),
        labels=torch.from_numpy(rng.integers(0, foundation.head_layout.classes, size=count)),
        domains=torch.zeros(count, dtype=torch.int64),
        preprocessing=Preprocessing(size, channels, (0.5,) * channels, (0.5,) * channels),
    )
    capacities = np.resize(CAPACITIES, clients)
    federation = Clients(np.split(np.arange(count), clients), np.zeros(clients, dtype=np.int64), capacities)
    training = TrainingConfig(batch_size=batch, local_epochs=1, max_local_steps=None)
    return Setting(
        name=name,
        foundation=foundation,
        samples=samples,
        sweep_model=_sweep_model(foundation, samples),
        lora=lora,
        lanes=lanes,
        work=LocalWork(federation, np.arange(clients), training, seed=0, round=0, lr=training.lr),
        assignment=Assignment(uniform_allocation(capacities, foundation.depth, rng)),
        state=GlobalState(
            initial_adapters(foundation.adapter_layout, foundation.depth, seed=0, dtype=torch.float32),
            foundation.initial_heads(),
        ),
    )


def _pixels(shape: Any, count: int) -> Tensor:
    size = (count, shape.num_channels, shape.image_size, shape.image_size)
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size).astype(np.uint8))


def _sweep_model(foundation: Foundation, samples: Samples) -> SweepModel:
    return SweepModel(foundation, lambda n: samples.inputs(torch.zeros(n, dtype=torch.int64), CPU, foundation.dtype))

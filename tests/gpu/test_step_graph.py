"""CUDA graphs of local steps: the bits of a round without them."""

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.graphs import differing_values
from benchmarks.gpu.shapes import SMALL_VIT
from benchmarks.gpu.workload import SGD, Workload
from fedra_engine.config import TrainingConfig
from fedra_engine.execution.step_graph import CudaGraphCapture


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [SGD, TrainingConfig()], ids=["SGD", "AdamW"])
def test_a_round_of_graphs_has_the_bits_of_one_without(training, dropout, monkeypatch):
    workload = Workload.random(SMALL_VIT, torch.device("cuda"), torch.float32, training=training, fuse_blocks=True)
    # Twice three clients, one after the other in their lanes.
    round, plain = workload.round(6, samples=2, steps=7), workload.sweep(3)
    lora = replace(plain.lora, dropout=dropout)
    expected = workload.train(replace(plain, lora=lora), round)
    captured, capture = [], CudaGraphCapture.capture
    monkeypatch.setattr(CudaGraphCapture, "capture", lambda self, step: (captured.append(1), capture(self, step))[1])
    found = workload.train(replace(workload.sweep(3, graphs=True), lora=lora), round)
    assert len(captured) == 2
    assert differing_values(found, expected) == 0
    assert differing_values(workload.state, expected) > 0

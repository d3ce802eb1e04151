"""What the report says of rounds with CUDA graphs, and of bits that differ."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import graphs
from benchmarks.gpu.sizes import REHEARSAL
from benchmarks.gpu.workload import Workload
from fedra_engine.models.state import GlobalState
from fedra_engine.runtime.errors import InputError

CPU = torch.device("cpu")


def test_without_a_gpu_every_line_says_that_there_were_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    (point,) = [point for point in REHEARSAL.points if point.graph_steps]
    assert point.shape is not None
    workload = Workload.random(point.shape, CPU, torch.float32)
    figures = graphs.graph_figures(workload, point)
    assert all(figure.name.startswith(f"{point.name}, 2 steps: no CUDA graphs without a GPU: ") for figure in figures)
    without, with_graphs, _, repeated, differing = figures
    assert min(without.value, with_graphs.value) > 0
    assert (repeated.value, differing.value, differing.met) == (0, 0, True)
    # A device whose own sums change from round to round says nothing about graphs.
    monkeypatch.setattr(graphs, "differing_values", lambda found, expected: 3)
    assert graphs.graph_figures(workload, point)[-1].target == ""
    with pytest.raises(InputError, match=r"execution\.cuda_graphs: found on with the device cpu"):
        workload.train(workload.sweep(2, graphs=True), workload.round(2, samples=1, steps=1))


def test_values_differ_by_their_bits_and_nan_does_not_differ_from_nan() -> None:
    one = GlobalState(torch.tensor([[1.0, torch.nan]]), torch.zeros(1, 2))
    assert graphs.differing_values(one, GlobalState(one.adapters.clone(), one.heads.clone())) == 0
    assert graphs.differing_values(one, GlobalState(torch.tensor([[1 + 1e-7, 0.0]]), torch.tensor([[0.0, 1.0]]))) == 3

"""A whole step, counted on a tiny ViT and on a tiny decoder."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks.cost.command import run_step
from benchmarks.cost.counter import Count
from benchmarks.cost.step import count_step
from benchmarks.gpu.shapes import DecoderShape, ModelShape, VitShape
from benchmarks.gpu.workload import Workload
from benchmarks.kernels.work import H100
from benchmarks.launches import LaunchCounts, counted_launches
from fedra_engine.execution.sweep import SweepExecutor
from fedra_kernels.dispatch import StandIn, launches_taken_by

TINY = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)


DECODER = DecoderShape(width=32, hidden=64, depth=3, heads=4, key_heads=2, vocabulary=50, length=6, rank=4, pool=8)


@pytest.fixture(scope="module", params=[TINY, DECODER], ids=["vit", "decoder"])
def shape(request: pytest.FixtureRequest) -> ModelShape:
    found: ModelShape = request.param
    return found


@pytest.fixture(scope="module")
def step(shape: ModelShape) -> Count:
    """Three clients that hold all blocks."""
    return count_step(shape, lanes=3, samples=2, capacities=(shape.depth,))


def test_the_kinds_add_up_to_the_step(step: Count) -> None:
    kinds = [step.of(kind=kind) for kind in ("products", "attention", "the rest")]
    assert all(kind.launches for kind in kinds)
    for figure in ("launches", "flops", "bytes"):
        assert sum(getattr(kind, figure) for kind in kinds) == getattr(step, figure)
    assert sum(kind.seconds(H100) for kind in kinds) == pytest.approx(step.seconds(H100))
    assert sum(step.of(op).bytes for op in step.ops) == step.bytes


def test_a_step_has_the_flops_of_its_model(step: Count, shape: ModelShape) -> None:
    samples = 6
    rows = samples * shape.tokens
    frozen = 2.0 * rows * sum(inputs * outputs for inputs, outputs in shape.layers)
    # The first block's query, key and value have nothing to give a gradient to.
    first = 2.0 * rows * sum(inputs * outputs for inputs, outputs in shape.layers[:3])
    low_rank = 2.0 * rows * shape.rank * sum(inputs + outputs for inputs, outputs in shape.layers)
    attention = 4.0 * samples * shape.tokens**2 * shape.width
    if isinstance(shape, VitShape):
        ends = 2.0 * samples * (shape.tokens - 1) * 3 * shape.patch**2 * shape.width
    else:
        assert isinstance(shape, DecoderShape)
        attention /= 2
        ends = 2 * 2.0 * samples * (shape.tokens - 1) * shape.width * shape.vocabulary
    blocks = shape.depth * (2 * frozen + 3.5 * attention + 3 * low_rank) - first
    assert step.flops == pytest.approx(blocks + ends, rel=0.02)
    assert step.of(kind="attention").flops == shape.depth * 3.5 * attention
    assert shape.block_flops() * samples == pytest.approx(2 * frozen + 3 * attention + 3 * low_rank)


def test_every_op_of_the_project_is_a_launch(step: Count, shape: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[LaunchCounts] = []
    train = SweepExecutor._step

    def counting(*args: Any) -> None:
        with counted_launches() as counts:
            train(*args)
        launched.append(counts)

    workload = Workload.random(shape, torch.device("cpu"), torch.bfloat16, fuse_blocks=True)
    assert workload.sweep_model.fused == shape.depth
    monkeypatch.setattr(SweepExecutor, "_step", counting)
    round = workload.round(3, samples=2, steps=2, capacities=(shape.depth,))
    with launches_taken_by(StandIn("sm_90")):
        workload.train(workload.sweep(3), round)
    assert step.of(ours=True).launches == launched[-1].triton.total()


def test_blocks_that_nobody_holds_cost_nothing(step: Count, shape: ModelShape) -> None:
    one = count_step(shape, lanes=3, samples=2, capacities=(1,))
    assert one.of(kind="attention").flops == pytest.approx(step.of(kind="attention").flops / shape.depth)
    assert one.bytes < 0.6 * step.bytes


def test_the_command_prints_every_part_of_a_step(shape: ModelShape, capsys: pytest.CaptureFixture[str]) -> None:
    run_step(shape, lanes=2, samples=1, all_blocks=True)
    printed = capsys.readouterr().out
    rows = {
        cells[0].strip(): [float(cell) for cell in cells[1:] if cell.strip()]
        for line in printed.splitlines()
        if len(cells := re.split("│", line.strip("│ "))) == 8
    }
    assert {"fedra_kernels::lora_gemm", "attention", "all"} <= set(rows)
    parts = [rows[name] for name in ("frozen products with their expand", "attention", "everything else")]
    for total, *shares in zip(rows["all"], *parts, strict=True):
        assert total == pytest.approx(sum(shares), abs=0.02)

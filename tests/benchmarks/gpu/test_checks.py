"""The report's checks find what is wrong, and nothing where all is well."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import checks, ops, smoke
from benchmarks.gpu.findings import Findings, StageFailed
from benchmarks.gpu.shapes import VitShape
from benchmarks.gpu.sizes import REHEARSAL
from benchmarks.gpu.workload import Workload
from fedra_engine.execution.executor import Executor
from fedra_engine.federation.assignment import Assignment
from fedra_engine.federation.updates import ClientUpdates
from fedra_engine.federation.work import LocalWork
from fedra_engine.models.state import GlobalState

CPU = torch.device("cpu")
TINY = VitShape(width=32, hidden=64, depth=3, heads=2, image=16, patch=8, classes=5, rank=4, pool=8)


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    return Findings(tmp_path, "stage", until=time.monotonic() + 300.0)


def test_rounds_agree_again_in_other_lanes_and_with_peft_far_below_the_tolerance(findings: Findings) -> None:
    sizes = replace(REHEARSAL, round_shape=TINY, round_clients=6, round_steps=2)
    checks.check_rounds(findings, sizes, CPU)
    assert len(findings.figures) == 3
    assert all(figure.value < 1e-5 for figure in findings.figures)


class _OneClientGoesTooFar:
    """The sequential executor, with the first client's change of its adapters scaled by 1.01."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def train(self, work: LocalWork, assignment: Assignment, state: GlobalState) -> Iterator[ClientUpdates]:
        for updates in self._executor.train(work, assignment, state):
            if 0 in updates.clients:
                start = state.adapters[torch.from_numpy(updates.slot_blocks)]
                updates.adapters.add_(updates.adapters - start, alpha=0.01)
            yield updates


def test_one_client_whose_change_is_one_percent_too_large_is_found(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequential = Workload.sequential
    monkeypatch.setattr(Workload, "sequential", lambda self: _OneClientGoesTooFar(sequential(self)))
    sizes = replace(REHEARSAL, round_shape=TINY, round_clients=6, round_steps=2)
    with pytest.raises(StageFailed, match=r"^round by sequential PEFT differs by [^;]*$"):
        checks.check_rounds(findings, sizes, CPU)


def test_an_op_that_depends_on_its_neighbours_fails_the_check(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def op(cohort: ops.Cohort) -> ops.Results:
        return {"y": torch.full((cohort.groups.rows, 1), float(len(cohort.groups)))}

    monkeypatch.setattr(ops, "OPS", {"broken": op})
    with pytest.raises(StageFailed, match=r"broken \(repeats, alone differs by"):
        checks.check_ops(findings, REHEARSAL, CPU)


@pytest.mark.parametrize("name", ops.OPS)
def test_the_op_checks_compare_a_clients_own_results(name: str) -> None:
    sizes, widths = (6, 1, 3), ops.Widths(inputs=40, outputs=24, rank=4, classes=7)
    together = ops.run_op(name, sizes, range(3), CPU, torch.float32, widths=widths)
    alone = ops.run_op(name, sizes, [2], CPU, torch.float32, widths=widths)
    for key, values in alone.items():
        torch.testing.assert_close(ops.part_of(together[key], sizes, 2), values, rtol=1e-4, atol=1e-5)
        assert not torch.equal(ops.part_of(together[key], sizes, 0), values)


def test_the_smoke_stage_finds_an_op_that_is_wrong_in_one_result(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoke.smoke(findings, REHEARSAL, CPU)
    assert [figure.met for figure in findings.figures] == [True] * 4
    right = smoke.lora_linear

    def wrong(*args: Any) -> torch.Tensor:
        args[-1].add_(0.01 * args[-1].abs().max() + 0.01)
        return right(*args)

    monkeypatch.setattr(smoke, "lora_linear", wrong)
    with pytest.raises(StageFailed, match=r"^lora_linear dB differs by"):
        smoke.smoke(findings, REHEARSAL, CPU)


def test_the_smoke_stage_finds_a_round_that_changes_nothing(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workload, "train", lambda self, *_: self.state)
    with pytest.raises(StageFailed, match=r"^a round changes the adapters by 0"):
        smoke.smoke(findings, REHEARSAL, CPU)

"""Whether results repeat, and do not depend on who shares the launch: bits for ops, changes for whole rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu import ops
from benchmarks.gpu.findings import Figure, Findings, StageFailed, at_most
from benchmarks.gpu.ops import part_of, run_op
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.gpu.workload import SGD, Workload
from fedra_engine.execution.executor import Executor
from fedra_engine.models.state import GlobalState

_ROUND_TOLERANCE = 1e-4
"""Of the largest change. On a CPU rounding alone gives 2e-6 (sweep against PEFT, SMALL_VIT, 8 clients, 2 steps)."""


def check_ops(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Run each op twice, and each client alone: all bits must agree.

    Raises:
        StageFailed: some do not.
    """
    rows, widths, dtype = sizes.ops.rows, sizes.ops.widths, sizes.dtype
    failed = []
    for name in ops.OPS:
        together = run_op(name, rows, range(len(rows)), device, dtype, widths=widths)
        again = run_op(name, rows, range(len(rows)), device, dtype, widths=widths)
        repeats = all(torch.equal(together[key], again[key]) for key in together)
        worst = 0.0
        for client in range(len(rows)):
            alone = run_op(name, rows, [client], device, dtype, widths=widths)
            for key, values in alone.items():
                worst = max(worst, _difference(part_of(together[key], rows, client), values))
        findings.row("ops", {"op": name, "repeats": repeats, "largest difference alone": worst})
        if not repeats or worst != 0.0:
            failed.append(f"{name} ({'repeats' if repeats else 'does not repeat'}, alone differs by {worst:.1e})")
    findings.figure(Figure("ops whose bits change on repeating or with neighbours", len(failed), "", "0", not failed))
    if failed:
        raise StageFailed("; ".join(failed))


def check_rounds(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """In float32 with SGD: a round again, with fewer lanes, and one client after another.

    Raises:
        StageFailed: the change of the global adapters or heads differs by more than rounding explains.
    """
    torch.backends.cudnn.allow_tf32 = False
    workload = Workload.random(sizes.round_shape, device, torch.float32, training=SGD, fuse_blocks=True)
    clients = sizes.round_clients
    round = workload.round(clients, samples=2, steps=sizes.round_steps)
    reference = workload.train(workload.sweep(clients), round)
    others: dict[str, Executor] = {
        "again": workload.sweep(clients),
        "in fewer lanes": workload.sweep(max(clients // 2 - 1, 1)),
        "by sequential PEFT": workload.sequential(),
    }
    failed = []
    for name, executor in others.items():
        difference = change_difference(workload.state, reference, workload.train(executor, round))
        findings.figure(at_most(f"round {name}: relative difference", difference, _ROUND_TOLERANCE))
        if not difference <= _ROUND_TOLERANCE:
            failed.append(f"round {name} differs by {difference:.1e}")
    if failed:
        raise StageFailed("; ".join(failed))


def change_difference(before: GlobalState, found: GlobalState, expected: GlobalState) -> float:
    """max|found − expected| / max|expected − before| over adapters and head, the larger; NaN stays NaN."""
    ratios = [
        ((mine - other).abs().max() / (other - start).abs().max())
        for start, mine, other in (
            (before.adapters, found.adapters, expected.adapters),
            (before.heads, found.heads, expected.heads),
        )
    ]
    return float(torch.stack(ratios).amax())


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference; NaN in one place only counts as infinite."""
    if torch.equal(found, expected):
        return 0.0
    difference = float((found.double() - expected.double()).abs().max())
    return difference if difference > 0.0 else float("inf")

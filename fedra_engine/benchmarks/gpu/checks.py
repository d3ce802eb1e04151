"""Whether results repeat, and do not depend on who shares the launch: bits for ops, changes for whole rounds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedra_engine.benchmarks.gpu import ops
from fedra_engine.benchmarks.gpu.findings import Figure, Findings, StageFailed
from fedra_engine.benchmarks.gpu.ops import part_of, run_op
from fedra_engine.benchmarks.gpu.workload import SMALL_VIT, Workload
from fedra_engine.models.state import GlobalState

SIZES = (591, 5, 197, 64, 1, 394, 128, 788)
"""Rows of each client: whole images, and sizes that end inside a tile."""
_ROUND_TOLERANCE = 1e-3


def check_ops(findings: Findings, device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int] = SIZES) -> None:
    """Run each op twice, and each client alone: all bits must agree.

    Raises:
        StageFailed: some do not.
    """
    failed = []
    for name in ops.OPS:
        together = run_op(name, sizes, range(len(sizes)), device, dtype)
        again = run_op(name, sizes, range(len(sizes)), device, dtype)
        repeats = all(torch.equal(together[key], again[key]) for key in together)
        worst = 0.0
        for client in range(len(sizes)):
            alone = run_op(name, sizes, [client], device, dtype)
            for key, values in alone.items():
                worst = max(worst, _difference(part_of(together[key], sizes, client), values))
        findings.row("ops", {"op": name, "repeats": repeats, "largest difference alone": worst})
        if not repeats or worst != 0.0:
            failed.append(f"{name} ({'repeats' if repeats else 'does not repeat'}, alone differs by {worst:.1e})")
    findings.figure(Figure("ops whose bits change on repeating or with neighbours", len(failed), "", "0", not failed))
    if failed:
        raise StageFailed("; ".join(failed))


def check_rounds(findings: Findings, device: torch.device) -> None:
    """In float32: a round again, with fewer lanes, and one client after another; changes of the global adapters.

    Raises:
        StageFailed: a change differs by more than rounding explains.
    """
    torch.backends.cudnn.allow_tf32 = False
    workload = Workload(SMALL_VIT, device, torch.float32)
    round = workload.round(8, images=4, steps=2)
    reference = workload.train(workload.sweep(8), round)
    others = {
        "again": workload.train(workload.sweep(8), round),
        "with 3 lanes": workload.train(workload.sweep(3), round),
        "sequential PEFT": workload.train(workload.sequential(), round),
    }
    failed = []
    for name, other in others.items():
        difference = _change_difference(workload.state, reference, other)
        findings.figure(Figure(f"round {name}: relative difference", difference, "", "≤ 0.001", _small(difference)))
        if not _small(difference):
            failed.append(f"round {name} differs by {difference:.1e}")
    if failed:
        raise StageFailed("; ".join(failed))


def _small(difference: float) -> bool:
    return difference <= _ROUND_TOLERANCE


def _change_difference(before: GlobalState, found: GlobalState, expected: GlobalState) -> float:
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

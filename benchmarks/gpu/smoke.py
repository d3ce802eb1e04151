"""Whether anything works at all: one op against float64 and one round with fused blocks, in seconds."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.findings import Findings, StageFailed, at_most
from benchmarks.gpu.ops import Cohort
from benchmarks.gpu.sizes import ReportSizes
from benchmarks.gpu.workload import SGD, Workload
from fedra_kernels import lora_linear, lora_linear_reference

PRECISION = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Largest error of an op as a share of its largest value: a guess; no GPU has been measured.

bf16 keeps 8 bits: 4e-3 a rounding, of which a result has a few in a row.
"""


def smoke(findings: Findings, sizes: ReportSizes, device: torch.device) -> None:
    """Both checks.

    Raises:
        StageFailed: an op or the round gives wrong values.
    """
    limit = PRECISION[sizes.dtype]
    failed = []
    for name, error in op_errors(sizes, device).items():
        findings.figure(at_most(f"lora_linear {name}: largest error", error, limit))
        if not error <= limit:
            failed.append(f"lora_linear {name} differs by {error:.1e} from float64")
    if change := _round_is_wrong(sizes, device):
        failed.append(change)
    if failed:
        raise StageFailed("; ".join(failed))


def op_errors(sizes: ReportSizes, device: torch.device) -> dict[str, float]:
    """max|found − float64| / max|float64| of y, dX, dA and dB."""
    op = sizes.smoke_ops
    results = []
    for exact in (False, True):
        cohort = Cohort(op.rows, range(len(op.rows)), device, sizes.dtype, op.widths)
        w, wide = op.widths, (lambda values: values.double()) if exact else (lambda values: values)
        x = wide(cohort.rows(0, w.inputs)).requires_grad_()
        a, b = wide(cohort.bank(1, w.rank, w.inputs)), wide(cohort.bank(2, w.outputs, w.rank))
        weight, bias = wide(cohort.frozen(3, w.outputs, w.inputs)), wide(cohort.frozen(4, w.outputs))
        upstream = wide(cohort.rows(5, w.outputs))
        if exact:
            a.requires_grad_()
            b.requires_grad_()
            y = lora_linear_reference(x, weight, bias, a, b, cohort.groups, 0.5)
            results.append([y.detach(), *torch.autograd.grad(y, (x, a, b), upstream)])
        else:
            sinks = cohort.sink(a), cohort.sink(b)
            y = lora_linear(x, weight, bias, a, b, cohort.groups, 0.5, *sinks)
            (grad,) = torch.autograd.grad(y, x, upstream)
            results.append([y.detach(), grad, *sinks])
    return {name: _error(*pair) for name, *pair in zip(("y", "dX", "dA", "dB"), *results, strict=True)}


def _round_is_wrong(sizes: ReportSizes, device: torch.device) -> str:
    """What is wrong with a round of the engine, fused; empty where its changes are numbers other than zero."""
    workload = Workload.random(sizes.smoke_shape, device, torch.float32, training=SGD, fuse_blocks=True)
    after = workload.train(workload.sweep(2), workload.round(2, samples=1, steps=1))
    for name, before, now in (
        ("adapters", workload.state.adapters, after.adapters),
        ("head", workload.state.heads, after.heads),
    ):
        change = float((now - before).abs().max())
        if not 0.0 < change < float("inf"):
            return f"a round changes the {name} by {change}"
    return ""


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())

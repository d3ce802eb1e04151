"""Are results the same again, and the same whoever shares the launch? Bits for ops, changes for whole rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedra_engine.benchmarks.gpu_findings import Figure, Findings, StageFailed
from fedra_engine.benchmarks.gpu_workload import SMALL_VIT, Workload
from fedra_engine.models.state import GlobalState
from fedra_kernels import RowGroups, gather_norm, gelu, head_cross_entropy, lora_linear

SIZES = (591, 5, 197, 64, 1, 394, 128, 788)
"""Rows of each client: whole images, and sizes that end inside a tile."""
_WIDTH, _OUTPUTS, _RANK, _CLASSES = 768, 768, 16, 100
_ROUND_TOLERANCE = 1e-3

Results = dict[str, Tensor]
"""Results of one op; each tensor's rows, or its slots, are those of the clients given, in order."""


def check_ops(findings: Findings, device: torch.device, dtype: torch.dtype, *, sizes: Sequence[int] = SIZES) -> None:
    """Run each op twice, and each client alone: all bits must agree.

    Raises:
        StageFailed: some do not.
    """
    failed = []
    for name, op in _OPS.items():
        together = op(sizes, range(len(sizes)), device, dtype)
        again = op(sizes, range(len(sizes)), device, dtype)
        repeats = all(torch.equal(together[key], again[key]) for key in together)
        worst = 0.0
        for client in range(len(sizes)):
            alone = op(sizes, [client], device, dtype)
            for key, values in alone.items():
                worst = max(worst, _difference(_part(together[key], sizes, client), values))
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


def _part(values: Tensor, sizes: Sequence[int], client: int) -> Tensor:
    """The rows, or the slot, of one client."""
    if len(values) == len(sizes):
        return values[client : client + 1]
    return values.split(list(sizes))[client]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference; NaN in one place only counts as infinite."""
    if torch.equal(found, expected):
        return 0.0
    difference = float((found.double() - expected.double()).abs().max())
    return difference if difference > 0.0 else float("inf")


class _Problem:
    """Random tensors of some clients; a client's are the same whoever else is there."""

    def __init__(self, sizes: Sequence[int], clients: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self._sizes, self._clients = sizes, clients
        self._device, self._dtype = device, dtype
        slots, own = torch.tensor(list(clients)), [sizes[client] for client in clients]
        self.groups = RowGroups(own, slots, torch.ones(len(own)), device)

    def rows(self, purpose: int, features: int) -> Tensor:
        """[rows of the clients, features]."""
        parts = [self._draw(purpose, client, self._sizes[client], features) for client in self._clients]
        return torch.cat(parts).to(self._device, self._dtype)

    def bank(self, purpose: int, *shape: int) -> Tensor:
        """[all clients, *shape]: the whole bank, whichever clients are there."""
        parts = [self._draw(purpose, client, *shape) for client in range(len(self._sizes))]
        return torch.stack(parts).mul_(0.05).to(self._device, self._dtype)

    def frozen(self, purpose: int, *shape: int) -> Tensor:
        return self._draw(purpose, -1, *shape).mul_(0.05).to(self._device, self._dtype)

    def sink(self, bank: Tensor) -> Tensor:
        return torch.zeros(bank.shape, device=self._device)

    def of_clients(self, sink: Tensor) -> Tensor:
        return sink[list(self._clients)]

    def labels(self) -> Tensor:
        parts = [torch.arange(self._sizes[client]) % _CLASSES for client in self._clients]
        return torch.cat(parts).to(self._device)

    @staticmethod
    def _draw(purpose: int, client: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * purpose + client + 1)
        return torch.randn(*shape, generator=generator)


def _lora(sizes: Sequence[int], clients: Sequence[int], device: torch.device, dtype: torch.dtype) -> Results:
    problem = _Problem(sizes, clients, device, dtype)
    x = problem.rows(0, _WIDTH).requires_grad_()
    lora_a, lora_b = problem.bank(1, _RANK, _WIDTH), problem.bank(2, _OUTPUTS, _RANK)
    grad_a, grad_b = problem.sink(lora_a), problem.sink(lora_b)
    weight, bias = problem.frozen(3, _OUTPUTS, _WIDTH), problem.frozen(4, _OUTPUTS)
    y = lora_linear(x, weight, bias, lora_a, lora_b, problem.groups, grad_a, grad_b)
    (grad_x,) = torch.autograd.grad(y, x, problem.rows(5, _OUTPUTS))
    sinks = {"grad_a": problem.of_clients(grad_a), "grad_b": problem.of_clients(grad_b)}
    return {"y": y.detach(), "grad_x": grad_x, **sinks}


def _norm(sizes: Sequence[int], clients: Sequence[int], device: torch.device, dtype: torch.dtype) -> Results:
    problem = _Problem(sizes, clients, device, dtype)
    stream = problem.rows(0, _WIDTH).requires_grad_()
    index = torch.arange(len(stream), device=device)
    weight, bias = problem.frozen(1, _WIDTH), problem.frozen(2, _WIDTH)
    banks = [problem.bank(3, _RANK, _WIDTH)]
    x, (shrunk,) = gather_norm(stream, index, weight, bias, kind="layer", eps=1e-6, lora_a=banks, groups=problem.groups)
    (grad,) = torch.autograd.grad(x, stream, problem.rows(4, _WIDTH))
    return {"x": x.detach(), "shrunk": shrunk, "grad": grad}


def _gelu(sizes: Sequence[int], clients: Sequence[int], device: torch.device, dtype: torch.dtype) -> Results:
    problem = _Problem(sizes, clients, device, dtype)
    x = problem.rows(0, _WIDTH).requires_grad_()
    y, shrunk = gelu(x, lora_a=problem.bank(1, _RANK, _WIDTH), groups=problem.groups)
    assert shrunk is not None
    (grad,) = torch.autograd.grad(y, x, problem.rows(2, _WIDTH))
    return {"y": y.detach(), "shrunk": shrunk, "grad": grad}


def _head(sizes: Sequence[int], clients: Sequence[int], device: torch.device, dtype: torch.dtype) -> Results:
    problem = _Problem(sizes, clients, device, torch.float32)
    features = problem.rows(0, _WIDTH).requires_grad_()
    weight, bias = problem.bank(1, _CLASSES, _WIDTH), problem.bank(2, _CLASSES)
    grad_weight, grad_bias = problem.sink(weight), problem.sink(bias)
    losses, _ = head_cross_entropy(features, weight, bias, problem.labels(), problem.groups, grad_weight, grad_bias)
    (grad,) = torch.autograd.grad(losses.sum(), features)
    sinks = {"grad_weight": problem.of_clients(grad_weight), "grad_bias": problem.of_clients(grad_bias)}
    return {"losses": losses.detach(), "grad": grad, **sinks}


Op = Callable[[Sequence[int], Sequence[int], torch.device, torch.dtype], Results]
_OPS: dict[str, Op] = {"lora_linear": _lora, "gather_norm": _norm, "gelu": _gelu, "head_cross_entropy": _head}

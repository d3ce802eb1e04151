"""The calls whose kernels the later stages need, on the CPU and with few rows: variants do not depend on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from benchmarks.gpu import ops
from benchmarks.gpu.compile_ahead import PreparedCall
from benchmarks.gpu.shapes import VitShape
from benchmarks.gpu.sizes import OpSizes, ReportSizes
from benchmarks.gpu.tiles import tile_cases, using_form
from benchmarks.gpu.workload import CPU, SGD, Round, Workload
from benchmarks.kernels.cases import ENGINE, Case, Sizes
from benchmarks.kernels.measure import kernel_cases
from fedra_kernels.dispatch import architecture

_ROWS = (5, 3)
"""Rows of each client for which an op is compiled."""


def calls_of(sizes: ReportSizes, groups: tuple[str, ...]) -> Sequence[PreparedCall]:
    """The calls of some groups; those that take longest to compile first."""
    return [call for group in groups for call in _GROUPS[group](sizes)]


def _step(sizes: ReportSizes) -> Iterator[PreparedCall]:
    shapes = dict.fromkeys([*(point.shape for point in sizes.points if point.shape is not None), sizes.scaling_shape])
    for shape in shapes:
        yield PreparedCall("training step", partial(_train, shape, sizes.dtype))


def _train(shape: VitShape, dtype: torch.dtype, sgd: bool = False) -> Callable[[], object]:
    # Three blocks compile what twelve do: above the first, one that all clients hold and one that only some do.
    small = replace(shape, depth=3, pool=2)
    workload = Workload.random(small, CPU, dtype, training=SGD if sgd else None, fuse_blocks=True)
    allocation = np.array([[True, True, True], [False, True, False]])
    return partial(_round, workload, replace(workload.round(2, samples=1, steps=2), allocation=allocation))


def _round(workload: Workload, round: Round) -> object:
    return workload.train(workload.sweep(2), round)


def _embedded_step(_: ReportSizes) -> Iterator[PreparedCall]:
    yield PreparedCall("training step of the embedded model", _train_embedded)


def _train_embedded() -> Callable[[], object]:
    workload = Workload.embedded(CPU, fuse_blocks=True)
    return partial(_round, workload, workload.round(2, samples=1, steps=2))


def _kernels(sizes: ReportSizes) -> Iterator[PreparedCall]:
    for case in kernel_cases(_few_rows(sizes.block), _few_rows(sizes.second_block)):
        yield PreparedCall(f"{case.kernel} {case.mode} {case.x}", partial(partial, _call, case))


def _tiles(sizes: ReportSizes) -> Iterator[PreparedCall]:
    for case in tile_cases(sizes, _few_rows(sizes.block), _few_rows(sizes.second_block)):
        yield PreparedCall(f"forms of {case.x}", partial(_all_forms, sizes, case))


def _all_forms(sizes: ReportSizes, case: Case) -> Callable[[], object]:
    inputs, rank = case.inputs(torch.Generator().manual_seed(0)), sizes.block(CPU).rank

    def call() -> None:
        for form in sizes.forms:
            with using_form(form, architecture(CPU), sizes.dtype, rank), torch.no_grad():
                case.providers[ENGINE](inputs)()

    return call


def _few_rows(block: Callable[[torch.device], Sizes]) -> Sizes:
    return replace(block(CPU), clients=2, samples=1, tokens=4, slots=4)


def _call(case: Case) -> None:
    with torch.no_grad():
        case.providers[ENGINE](case.inputs(torch.Generator().manual_seed(0)))()


def _checked_ops(sizes: ReportSizes) -> Iterator[PreparedCall]:
    for name in ops.OPS:
        yield PreparedCall(name, partial(partial, _run_op, sizes.ops, name, sizes.dtype))


def _checked_round(sizes: ReportSizes) -> Iterator[PreparedCall]:
    yield PreparedCall("checked round", partial(_train, sizes.round_shape, torch.float32, sgd=True))


def _smoke_ops(sizes: ReportSizes) -> Iterator[PreparedCall]:
    yield PreparedCall("lora_linear", partial(partial, _run_op, sizes.smoke_ops, "lora_linear", sizes.dtype))


def _smoke_round(sizes: ReportSizes) -> Iterator[PreparedCall]:
    yield PreparedCall("smoke round", partial(_train, sizes.smoke_shape, torch.float32, sgd=True))


def _run_op(op: OpSizes, name: str, dtype: torch.dtype) -> ops.Results:
    return ops.run_op(name, _ROWS, range(len(_ROWS)), CPU, dtype, widths=op.widths)


_GROUPS: Mapping[str, Callable[[ReportSizes], Iterator[PreparedCall]]] = {
    "step": _step,
    "embedded step": _embedded_step,
    "kernels": _kernels,
    "tiles": _tiles,
    "checked ops": _checked_ops,
    "checked round": _checked_round,
    "smoke ops": _smoke_ops,
    "smoke round": _smoke_round,
}

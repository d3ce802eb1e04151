"""What each kernel needs on a GPU that is not here: registers, stack, spills, shared memory, tensor-core use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import triton
from rich.table import Table

from benchmarks.kernels.aot import ARCHITECTURES
from benchmarks.kernels.aot_cases import measure
from fedra_engine.runtime.errors import InputError
from fedra_engine.runtime.files import write_whole

_INTRODUCTION = """# What the kernels need, by architecture

Compiled ahead of time, without a GPU, by
`python launchers/microbench.py resources docs/results/kernel_resources.md`.
Registers are per thread, stack and shared memory in bytes; `small` stands for GPUs with little shared memory. Wide
loads and stores are the shares of the bytes loaded from and stored to global memory that move 16 an instruction,
counted in the program and without TMA."""
_COLUMNS = (
    "kernel", "case", "warps", "registers", "stack", "spills", "shared", "matrix instructions", "wide loads",
    "wide stores",
)  # fmt: skip


def resource_table(architecture: str) -> Table:
    """Compile every kernel for `architecture` and list its needs; about a second per kernel."""
    limit = ARCHITECTURES[architecture].shared_limit
    table = Table(
        title=f"Compiled ahead of time for {architecture} ({limit:,} bytes of shared memory)", title_justify="left"
    )
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in _rows(architecture):
        table.add_row(*row)
    return table


def write_resources(file: Path) -> None:
    """Compile every kernel for every architecture and write a Markdown page of their needs; takes minutes.

    Raises:
        InputError: the folder is missing, or the file holds something else.
    """
    if not file.parent.is_dir():
        raise InputError(f"file: found no folder {file.parent}, expected one")
    title = _INTRODUCTION.partition("\n")[0]
    if os.path.lexists(file) and not (file.is_file() and file.read_bytes().startswith(title.encode())):
        raise InputError(f"file: found {file}, which is another page, expected none, or an earlier one of these")
    sections = [_section(architecture) for architecture in ARCHITECTURES]
    write_whole(file, "\n\n".join([_INTRODUCTION, *sections]) + "\n")


def _section(architecture: str) -> str:
    limit = ARCHITECTURES[architecture].shared_limit
    lines = [
        f"## {architecture}",
        f"Shared memory limit {limit:,} bytes; Triton {triton.__version__}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(f"| {' | '.join(row)} |" for row in _rows(architecture)),
    ]
    return "\n".join(lines)


def _rows(architecture: str) -> Iterator[list[str]]:
    for case, need in measure(architecture):
        figures = (need.warps, need.registers, need.stack, need.spills, need.shared, need.dots)
        shares = (f"{share:.0%}" for share in (need.wide_loads, need.wide_stores))
        yield [need.kernel.removesuffix("_kernel"), case.name, *(f"{figure:,}" for figure in figures), *shares]

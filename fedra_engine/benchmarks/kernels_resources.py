"""What each kernel needs on a GPU that is not here: registers, stack, spills, shared memory, tensor-core use."""

from __future__ import annotations

from rich.table import Table

from fedra_kernels.aot import ARCHITECTURES
from fedra_kernels.aot_cases import measure


def resource_table(architecture: str) -> Table:
    """Compile every kernel for `architecture` and list its needs; about a second a kernel."""
    limit = ARCHITECTURES[architecture].shared_limit
    table = Table(
        title=f"Compiled ahead of time for {architecture} ({limit:,} bytes of shared memory)", title_justify="left"
    )
    for column in ("case", "kernel"):
        table.add_column(column)
    for column in ("warps", "registers", "stack", "spills", "shared", "matrix instructions"):
        table.add_column(column, justify="right")
    for case, needs in measure(architecture):
        figures = (needs.warps, needs.registers, needs.stack, needs.spills, needs.shared, needs.dots)
        table.add_row(case.name, needs.kernel, *map(str, figures))
    return table

"""Every kernel and configuration compiles for each architecture and keeps within what its GPUs offer."""

from pathlib import Path

import pytest

from fedra_kernels import aot_cases
from fedra_kernels.aot import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "results" / "kernel_resources.md"
REGISTER_FILE = 65_536
MOST_REGISTERS = {"cuda": 255, "hip": 512}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_fit(architecture):
    measured = aot_cases.measure(architecture)
    aot_cases.write_table(PAGE, architecture, measured)
    limits = ARCHITECTURES[architecture]
    backend, threads = limits.target.backend, limits.target.warp_size
    faults = []
    for case, need in measured:
        checks = {
            "stack": need.stack == 0,
            "spills": need.spills == 0,
            "shared memory": need.shared <= limits.shared_limit,
            "registers": need.registers <= MOST_REGISTERS[backend],
            "register file": backend == "hip" or need.registers * need.warps * threads <= REGISTER_FILE,
            "tensor cores": need.dots > 0 or not need.half_dots,
        }
        faults += [f"{what}: {case.name}: {need}" for what, holds in checks.items() if not holds]
    assert not faults, "\n".join(faults)
    assert any(need.half_dots for _, need in measured)

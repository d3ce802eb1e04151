"""Every kernel and configuration compiles for each architecture and keeps within what its GPUs offer."""

import importlib
import pkgutil

import pytest

import fedra_kernels
from fedra_kernels import aot_cases
from fedra_kernels.aot import ARCHITECTURES
from fedra_kernels.configs import choose, shape_class

REGISTER_FILE = 65_536
MOST_REGISTERS = {"cuda": 255, "hip": 512}


def _modules():
    names = [module.name for module in pkgutil.iter_modules(fedra_kernels.__path__)]
    return [importlib.import_module(f"fedra_kernels.{name}") for name in names]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stay_within_the_limits_of_each_architecture(architecture, monkeypatch):
    chosen = set()

    def recorded(table, tensor, rank):
        chosen.add((id(table), shape_class(tensor.dtype, rank)))
        return choose(table, tensor, rank)

    tables = {}
    for module in _modules():
        for name in ("CONFIGS", "DROPOUT_CONFIGS"):
            if hasattr(module, name):
                tables[f"{module.__name__}.{name}"] = getattr(module, name)
                monkeypatch.setattr(module, "choose", recorded)
    measured = aot_cases.measure(architecture)
    unused = [
        (name, shape)
        for name, table in tables.items()
        for shape in table[architecture]
        if (id(table), shape) not in chosen
    ]
    assert not unused, "configurations that no case compiles"
    kernels = {name for module in _modules() for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {need.kernel for _, need in measured}
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

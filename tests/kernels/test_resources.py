"""Every kernel and configuration compiles for each architecture and keeps within what its GPUs offer."""

import re

import pytest

from benchmarks.kernels import aot_cases
from benchmarks.kernels.aot import ARCHITECTURES, compile_only
from fedra_kernels._kernels import lora_gemm, lora_single_pass, product_forms
from fedra_kernels._kernels.configs import choose, shape_class

from .helpers import kernel_modules, kernel_names

pytestmark = pytest.mark.slow

REGISTER_FILE = 65_536
MOST_REGISTERS = {"cuda": 255, "hip": 512}
# Of the bytes a streaming kernel loads or stores, what must move 16 at a time. The rest is row numbers and tables, and
# in kernels with a product factors of 16 columns, of which a thread has 8 bytes.
WIDE_SHARE, WIDE_SHARE_WITH_PRODUCT = 0.75, 0.5
STREAMING = {
    "gather_norm_kernel", "gather_norm_backward_kernel", "activation_forward_kernel", "activation_gradient_kernel",
    "sgd_kernel", "adamw_kernel", "squared_norms_kernel", "aggregate_kernel",
    "lora_shrink_kernel", "lora_grad_output_kernel", "lora_grad_outer_kernel", "lora_grad_reduce_kernel",
    "low_rank_add_kernel",
}  # fmt: skip
# A slot and a weight a holder.
NARROWER_LOADS = {"aggregate_kernel": 0.5}
# One number a row; two numbers beside the row itself.
NARROWER_STORES = {"squared_norms_kernel": 0.0, "gather_norm_kernel": 0.5}
# Of shared memory, for two programs on a multiprocessor of sm_90 or sm_100.
MOST_SHARED_BY_TWO = 113 * 1024
TENSOR_LOAD, TENSOR_STORE = (
    rf"cp\.async\.bulk\.tensor\.2d\.{places}\b" for places in (r"shared::\w+\.global", r"global\.shared::\w+")
)
# In a persistent kernel: the load of a block, behind it and under a condition the store of a tile.
FUSED = re.compile(
    r"^ {6}ttng\.async_tma_copy_global_to_local.*^ {8,}ttng\.async_tma_copy_local_to_global", re.M | re.S
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stay_within_the_limits_of_each_architecture(architecture, monkeypatch):
    chosen = set()

    def recorded(table, tensor, rank):
        chosen.add((id(table), shape_class(tensor.dtype, rank)))
        return choose(table, tensor, rank)

    tables = {}
    for module in kernel_modules():
        for name in vars(module):
            if name.endswith("CONFIGS"):
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
    assert {need.kernel for _, need in measured} == kernel_names() >= STREAMING
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
        # What an AMD GPU multiplies it stores in the shape of its matrix instructions.
        if need.kernel in STREAMING and not (backend == "hip" and need.dots):
            share = WIDE_SHARE_WITH_PRODUCT if need.half_dots else WIDE_SHARE
            checks["16-byte loads"] = need.wide_loads >= NARROWER_LOADS.get(need.kernel, share)
            checks["16-byte stores"] = need.wide_stores >= NARROWER_STORES.get(need.kernel, share)
        faults += [f"{what}: {case.name}: {need}" for what, holds in checks.items() if not holds]
    assert not faults, "\n".join(faults)
    assert any(need.half_dots for _, need in measured)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_form_of_a_product_is_compiled_and_has_what_chose_it(architecture, monkeypatch):
    """TMA loads and stores where the tile asks for them; programs of four warps fit a multiprocessor in pairs."""
    taken = []

    def recorded(*arguments):
        taken.append(product_forms.choose_form(*arguments))
        return taken[-1]

    for module in (lora_gemm, lora_single_pass):
        monkeypatch.setattr(module, "choose_form", recorded)
    with compile_only(architecture) as compilation:
        for case in aot_cases.cases():
            if case.name.startswith(("lora_linear", "products")):
                case.call()
    kernels = [compiled for name, compiled in compilation.kernels if name.startswith(("lora_gemm", "lora_single"))]
    loads, stores = set(), set()
    for form, compiled in zip(taken, kernels, strict=True):
        program = compiled.asm.get("ptx", "")
        loads |= {form} if re.search(TENSOR_LOAD, program) else set()
        stores |= {form} if (stored := re.search(TENSOR_STORE, program)) else set()
        if form.persistent and stored:
            assert FUSED.search(compiled.asm["ttgir"]), f"the loops over tiles and depth are not fused: {form}"
        if form.tile.descriptors and form.tile.warps == 4:
            assert compiled.metadata.shared <= MOST_SHARED_BY_TWO, form
    tables = (product_forms.GEMM_FORMS, product_forms.DROPOUT_FORMS, product_forms.SINGLE_PASS_FORMS)
    forms = {form for table in tables for some in table[architecture].values() for form in some}
    assert forms == set(taken), "forms that no case compiles"
    assert loads == stores == {form for form in forms if form.tile.descriptors}

"""Nothing is compiled in the middle of training: what varies from step to step specializes no kernel.

Triton compiles a kernel anew when an integer argument becomes 1 or starts or ceases to be a multiple of 16, and when
a pointer starts or ceases to be aligned to 16 bytes. Rows, groups and slots in use vary between steps, and a table may
lie anywhere in a packed copy; features, strides and the alignment of the large matrices do not vary.
"""

from collections import defaultdict
from itertools import product

import pytest
import torch
import triton

from fedra_kernels.aot import compile_only
from fedra_kernels.aot_cases import Shapes, cases

from .helpers import kernel_names

COUNTS = {"rows", "row_tiles", "stream_rows", "slot_count"}
TABLES = {
    "index_ptr", "labels_ptr", "slots_ptr", "starts_ptr", "weights_ptr", "lr_ptr", "clip_ptr", "step_ptr", "shares_ptr",
    "filled_ptr", "spans_ptr", "chunks_ptr", "groups_a_ptr", "groups_b_ptr", "scales_ptr", "keys_ptr",
    "keys0_ptr", "keys1_ptr", "keys2_ptr",
}  # fmt: skip
# Row counts of 1, 15, 16, 17, 4096, 4100 and 201,728 (64 clients with 16 images of 197 tokens).
SIZES = [(1,), (7, 8), (1,) * 16, (16, 1), (256,) * 16, (4000, 99, 1), (16 * 197,) * 64]
CASES = [case.name for case in cases()]


def _elsewhere(table):
    """The same table, not aligned to 16 bytes."""
    moved = table.new_empty(table.numel() + 1)[1:].view(table.shape)
    return moved.copy_(table)


class Launches:
    """(kernel, arguments by name, what each is specialized on) of every launch; nothing is compiled.

    tables_moved: whether the kernels get their tables at an address that is not aligned.
    """

    def __init__(self):
        self.tables_moved = False
        self.made = []

    def warmup(self, kernel, *args, grid, **options):
        if self.tables_moved:
            args = [
                _elsewhere(arg) if param.name in TABLES and isinstance(arg, torch.Tensor) else arg
                for param, arg in zip(kernel.params, args, strict=False)
            ]
        *_, bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        bound, specialized, _ = bind(*args, **options)
        self.made.append((kernel, bound, dict(zip(kernel.arg_names, specialized, strict=True))))

    def of(self, name, sizes):
        """Those of the case `name` with groups of these sizes."""
        self.made = []
        (case,) = (
            case for case in cases(Shapes(sizes, width=32, outputs=48, classes=10, slot=160)) if case.name == name
        )
        with compile_only("sm_90"):
            case.call()
        return self.made


@pytest.fixture(name="launches")
def _launches(monkeypatch):
    launches = Launches()
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda *args, **options: launches.warmup(*args, **options))
    return launches


@pytest.mark.parametrize("name", CASES)
def test_one_variant_serves_every_row_count_and_every_place_of_a_table(name, launches):
    first = None
    for launches.tables_moved, sizes in product((False, True), SIZES):
        variants = [(kernel.__name__, specialized) for kernel, _, specialized in launches.of(name, sizes)]
        first = first or variants
        assert variants == first, f"{sum(sizes)} rows, tables moved: {launches.tables_moved}"
    assert first


def test_every_kernel_and_every_argument_that_varies_is_tried(launches):
    """Else the test above would not notice an argument that specializes again."""
    kinds, kernels = defaultdict(set), {}
    for name, sizes in product(CASES, SIZES[:-1]):
        for kernel, bound, _ in launches.of(name, sizes):
            kernels[kernel.__name__] = kernel
            for argument in COUNTS & set(bound):
                value = bound[argument]
                kinds[kernel.__name__, argument].add(1 if value == 1 else value % 16 == 0)
    assert set(kernels) == kernel_names()
    for kernel in kernels.values():
        varying = [param.name for param in kernel.params if param.name in COUNTS | TABLES]
        assert sorted(kernel.do_not_specialize) == sorted(varying), kernel.__name__
        for argument in COUNTS & set(varying):
            assert len(kinds[kernel.__name__, argument]) > 1, f"{argument} of {kernel.__name__}"

"""Nothing is compiled in the middle of training: what varies from step to step specializes no kernel.

Triton compiles a kernel anew when an integer argument becomes 1 or starts or ceases to be a multiple of 16, and when
a pointer starts or ceases to be aligned to 16 bytes. Rows, groups and slots in use vary between steps, and a table may
lie anywhere in a packed copy; features, strides and the alignment of the large matrices do not vary.
"""

from collections import defaultdict
from itertools import product

import pytest

from benchmarks.kernels.aot_cases import Shapes, cases

from .helpers import kernel_names
from .launches import TABLES, Launch, record_launches

COUNTS = {"rows", "row_tiles", "stream_rows", "out_rows", "residual_rows", "slot_count"}
# Row counts of 1, 15, 16, 17, 4096, 4100 and 201,728 (64 clients with 16 images of 197 tokens).
SIZES = [(1,), (7, 8), (1,) * 16, (16, 1), (256,) * 16, (4000, 99, 1), (16 * 197,) * 64]
CASES = [case.name for case in cases()]


def launches_of(name: str, sizes: tuple[int, ...], tables_moved: bool = False) -> list[Launch]:
    """Those of the case `name` with groups of these sizes."""
    shapes = Shapes(sizes, width=32, outputs=48, classes=10, slot=160)
    (case,) = (case for case in cases(shapes) if case.name == name)
    with record_launches(tables_moved) as launches:
        case.call()
    return launches


@pytest.mark.parametrize("name", CASES)
def test_one_variant_serves_every_row_count_and_every_place_of_a_table(name: str) -> None:
    first = None
    for moved, sizes in product((False, True), SIZES):
        variants = [(launch.kernel.__name__, launch.specialized) for launch in launches_of(name, sizes, moved)]
        first = first or variants
        assert variants == first, f"{sum(sizes)} rows, tables moved: {moved}"
    assert first


def test_every_kernel_and_every_argument_that_varies_is_tried() -> None:
    """Else the test above would not notice an argument that specializes again."""
    kinds, kernels = defaultdict(set), {}
    for name, sizes in product(CASES, SIZES[:-1]):
        for launch in launches_of(name, sizes):
            kernels[launch.kernel.__name__] = launch.kernel
            for argument in COUNTS & set(launch.arguments):
                value = launch.arguments[argument]
                kinds[launch.kernel.__name__, argument].add(1 if value == 1 else value % 16 == 0)
    assert set(kernels) == kernel_names()
    for kernel in kernels.values():
        varying = [param.name for param in kernel.params if param.name in COUNTS | TABLES]
        assert sorted(kernel.do_not_specialize) == sorted(varying), kernel.__name__
        for argument in COUNTS & set(varying):
            assert len(kinds[kernel.__name__, argument]) > 1, f"{argument} of {kernel.__name__}"

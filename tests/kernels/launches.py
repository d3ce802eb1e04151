"""What the ops launch, without a GPU and without compiling anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.kernels.aot import compile_only

TABLES = {
    "index_ptr", "labels_ptr", "slots_ptr", "starts_ptr", "weights_ptr", "lr_ptr", "clip_ptr", "step_ptr", "shares_ptr",
    "out_index_ptr", "residual_index_ptr", "filled_ptr", "spans_ptr", "chunks_ptr", "groups_ptr",
    "keys_ptr", "keys0_ptr", "keys1_ptr", "keys2_ptr",
}  # fmt: skip


class Launch(NamedTuple):
    """kernel: the Triton function. arguments, specialized: by name, its value and what Triton specializes on."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    specialized: dict[str, Any]


@contextmanager
def record_launches(tables_moved: bool = False) -> Iterator[list[Launch]]:
    """The launches for sm_90 inside the block.

    tables_moved: the kernels get their tables at addresses that are not aligned to 16 bytes.
    """
    launches: list[Launch] = []

    def warmup(kernel: Any, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        if tables_moved:
            args = tuple(
                _elsewhere(arg) if param.name in TABLES and isinstance(arg, Tensor) else arg
                for param, arg in zip(kernel.params, args, strict=False)
            )
        *_, bind = kernel.device_caches[triton.runtime.driver.active.get_current_device()]
        arguments, specialized, _ = bind(*args, **options)
        launches.append(Launch(kernel, grid, arguments, dict(zip(kernel.arg_names, specialized, strict=True))))

    with patch.object(triton.JITFunction, "warmup", warmup), compile_only("sm_90"):
        yield launches


def _elsewhere(table: Tensor) -> Tensor:
    """The same table, not aligned to 16 bytes."""
    moved = torch.empty(table.numel() + 1, dtype=table.dtype)[1:].view(table.shape)
    return moved.copy_(table)

"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), without which it is silently wrong or fails.

Versions 3.6 to 3.9 hold bf16 blocks as 16-bit integers, and `tl.dot` multiplies those integers. It also takes
a BLAS product, which rounds a row differently at different places of a block, as no GPU does. Version 3.6 makes
a loop bound that was loaded from memory with int(array of one element), which NumPy 2.4 refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter as triton_interpreter


def repair() -> None:
    """Install the repairs; every kernel interpreted later uses them."""
    triton_interpreter.InterpreterBuilder.create_dot = _create_dot
    patch_tensor = triton_interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = _index

    triton_interpreter._patch_lang_tensor = patch_tensor_and_index


def _create_dot(_: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = (_widen(operand).astype(d.data.dtype, copy=False) for operand in (a, b))
    with np.errstate(all="ignore"):
        # Summed over an outer axis: one addition after the other, the same for every row and column.
        product = np.multiply(left[:, :, None], right[None, :, :]).sum(axis=1)
    return triton_interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _widen(handle: Any) -> np.ndarray:
    """The block in a dtype NumPy can multiply: bf16 is the upper half of fp32."""
    if handle.dtype.is_bf16():
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _index(tensor: Any) -> int:
    return int(tensor.handle.data.item())

"""Argument checks shared by the ops: host-only, one clear line each, before any launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import nothing_runs, use_triton
from ..groups import RowGroups

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; None stands for any extent."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        want is not None and have != want for have, want in zip(shape, expected, strict=True)
    ):
        wanted = ["any" if want is None else want for want in expected]
        raise ValueError(f"{name}: found shape {list(shape)}, expected {wanted}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless `tensor` has the dtype and device of `other`."""
    check_dtype(name, tensor, (other.dtype,))
    check_device(name, tensor, other_name, other)


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"{name}: found dtype {tensor.dtype}, expected {wanted}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the path that the op takes has this dtype: float64 is for torch on a CPU."""
    check_dtype(name, tensor, KERNEL_DTYPES if use_triton(tensor) else FLOAT_DTYPES)


def check_device(name: str, tensor: Tensor | RowGroups, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: found on {tensor.device}, expected {other.device} as {other_name}")


def check_bank(name: str, bank: Tensor) -> None:
    """Raise ValueError unless the dimensions behind the slot dimension are contiguous."""
    expected = 1
    for size, stride in zip(reversed(bank.shape[1:]), reversed(bank.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            raise ValueError(
                f"{name}: found strides {list(bank.stride())} for shape {list(bank.shape)}, "
                "expected contiguous dimensions behind the slot dimension"
            )
        expected *= size


def check_sink(name: str, sink: Tensor, bank: Tensor, x_name: str, x: Tensor) -> None:
    """Raise ValueError unless a gradient sink is shaped as its bank, on x's device, and of x's dtype or a wider one."""
    check_shape(name, sink, bank.shape)
    check_device(name, sink, x_name, x)
    check_dtype(name, sink, (x.dtype, torch.float32, torch.float64))
    check_bank(name, sink)


def check_stream(name: str, stream: Tensor) -> None:
    """Raise ValueError unless `stream` is a contiguous floating-point tensor of at least two dimensions."""
    if stream.dim() < 2:
        raise ValueError(f"{name}: found shape {list(stream.shape)}, expected [rows, features]")
    check_float(name, stream)
    if not stream.is_contiguous():
        raise ValueError(f"{name}: found strides {list(stream.stride())}, expected a contiguous tensor")


def stream_rows(stream: Tensor) -> Tensor:
    """A contiguous tensor [..., features] as [rows, features], a view."""
    return stream.view(-1, stream.shape[-1])


def check_index(name: str, index: Tensor, target_name: str, target: Tensor, dim: int = 0) -> None:
    """Raise ValueError unless `index` is int64 [n] on the target's device and indexes its dimension `dim`.

    The range is checked for host tensors alone, and where ops run: reading a GPU's tensor back would stall its queue.
    """
    check_shape(name, index, (None,))
    check_dtype(name, index, (torch.int64,))
    check_device(name, index, target_name, target)
    if index.device.type != "cpu" or nothing_runs(index.device) or not index.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    size = target.shape[dim]
    if low < 0 or high >= size:
        found = low if low < 0 else high
        raise ValueError(f"{name}: found {found}, expected 0 to {size - 1} as {target_name} has")

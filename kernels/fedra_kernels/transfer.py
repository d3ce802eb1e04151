"""Host tables on their way to a device: all of them in one copy, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 8
"""Bytes at multiples of which arrays begin: torch views bytes as a dtype only at multiples of its size."""


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on `device`, in order; views of one tensor, unless the device is a CPU.

    A GPU gets them from page-locked memory, so that the host need not wait until its queue has come to the copy.
    """
    arrays = [np.ascontiguousarray(array) for array in arrays]
    if device.type == "cpu" or not arrays:
        return [torch.from_numpy(array) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staging.numpy()
    for array, start in zip(arrays, starts, strict=False):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = staging.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]

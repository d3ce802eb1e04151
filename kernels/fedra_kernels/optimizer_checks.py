"""Argument checks of the optimizers over bank slots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_bank, check_device, check_dtype, check_float, check_index, check_shape


def check_bank_state(param: Tensor, slots: Tensor, state: Mapping[str, Tensor | None], shadow: Tensor | None) -> None:
    """Raise ValueError unless gradient and state are shaped as param [slots, P] and slots is int64 [n]."""
    check_shape("param", param, (None, None))
    check_float("param", param)
    check_index("slots", slots, "param", param)
    if slots.device.type == "cpu" and len(set(slots.tolist())) != len(slots):
        raise ValueError(f"slots: found a slot twice in {slots.tolist()}, expected distinct slots")
    for name, tensor in {"param": param, **state, "shadow": shadow}.items():
        if tensor is None:
            continue
        check_shape(name, tensor, param.shape)
        check_device(name, tensor, "param", param)
        check_bank(name, tensor)
        if name == "shadow":
            check_dtype(name, tensor, (torch.bfloat16, torch.float16))
        else:
            check_dtype(name, tensor, (param.dtype, torch.float32))


def check_per_slot(param: Tensor, slots: Tensor, tables: Mapping[str, Tensor], step: Tensor) -> None:
    """Raise ValueError unless each table is [n] in fp32 (fp64 for fp64 banks), and step int64 [n]."""
    wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, table in tables.items():
        check_shape(name, table, slots.shape)
        check_dtype(name, table, (wanted,))
        check_device(name, table, "param", param)
    check_shape("step", step, slots.shape)
    check_dtype("step", step, (torch.int64,))
    check_device("step", step, "param", param)

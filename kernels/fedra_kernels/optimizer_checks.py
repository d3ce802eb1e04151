"""Argument checks of the optimizers over bank slots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import (
    FLOAT_DTYPES,
    check_bank,
    check_device,
    check_dtype,
    check_index,
    check_like,
    check_shape,
)


def check_bank_state(param: Tensor, grad: Tensor, slots: Tensor, state: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless gradient and state are shaped as param [slots, P]; slots int64 [n] in range."""
    check_shape("param", param, (None, None))
    check_dtype("param", param, FLOAT_DTYPES)
    check_index("slots", slots, "param", param)
    tensors = {"param": param, "grad": grad, **{k: v for k, v in state.items() if v is not None}}
    for name, tensor in tensors.items():
        check_shape(name, tensor, param.shape)
        check_like(name, tensor, "param", param)
        check_bank(name, tensor)


def check_per_slot(param: Tensor, slots: Tensor, tables: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless each table is [n] in fp32 (fp64 for fp64 banks)."""
    wanted = torch.float64 if param.dtype == torch.float64 else torch.float32
    for name, table in tables.items():
        check_shape(name, table, slots.shape)
        check_dtype(name, table, (wanted,))
        check_device(name, table, "param", param)

"""Parameters kept in shards: DeepSpeed's ZeRO-3 leaves an empty tensor in each and knows what belongs there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether the processes of the job keep shards of the parameters of `module`, instead of copies."""
    return any(_in_shards(parameter) for parameter in module.parameters())


def parameter_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def parameter_count(module: nn.Module) -> int:
    """Parameters of `module`, of all shards together."""
    return sum(parameter_shape(parameter).numel() for parameter in module.parameters())


@contextmanager
def gathered(module: nn.Module, *, writes: bool = False, recurse: bool = False) -> Iterator[None]:
    """The parameters that `module` holds itself are whole inside; all processes must enter together.

    With `recurse` so are those of the modules in it.

    For what reads them without calling the module, which is when DeepSpeed gathers them of its own accord. With
    `writes` what the main process writes into them stays.
    """
    sharded = [parameter for parameter in module.parameters(recurse) if _in_shards(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if writes else None):
        yield


def _in_shards(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")

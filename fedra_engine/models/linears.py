"""Linear layers, whichever way round a library stores their weight."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedra_engine.models.sharded_parameters import parameter_shape


def is_linear(module: nn.Module) -> bool:
    """Whether `module` can carry an adapter: torch's Linear, or GPT-2's Conv1D, whose weight is stored as [in, out]."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(in features, out features)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    rows, columns = parameter_shape(weight)
    return (rows, columns) if stores_input_first(linear) else (columns, rows)


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight as [out, in]; a view, so that writing into it changes the layer."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.T if stores_input_first(linear) else weight


def stores_input_first(linear: nn.Module) -> bool:
    """Whether the weight is stored as [in, out] (PEFT's `fan_in_fan_out`)."""
    return isinstance(linear, Conv1D)

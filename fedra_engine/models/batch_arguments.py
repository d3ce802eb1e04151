"""Find the batch dimension of each argument of a block, by running the model on two and on three samples.

One shape alone cannot tell: a mask that all samples share may have any length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedra_engine.runtime.errors import InputError, one_line

_PROBES = (2, 3)
_Call = tuple[list[Any], Any]
"""The leaves of a block's flattened arguments, and what it returned."""


@dataclass(frozen=True)
class BatchArguments:
    """The batch dimensions of a block's arguments, and the form of its output.

    Attributes:
        dimensions: of each leaf of the flattened (args, kwargs); None without a batch dimension.
        hidden: index of the hidden states among the leaves.
        returned: length of the tuple that the block returns, hidden states first; 0 if it returns no tuple.
    """

    dimensions: tuple[int | None, ...]
    hidden: int
    returned: int

    def hidden_states(self, args: Any, kwargs: Any) -> Tensor:
        """The hidden states in a block's arguments, [samples, …]."""
        return tree_flatten((args, kwargs))[0][self.hidden]

    def select(self, args: Any, kwargs: Any, index: Tensor | None, hidden: Tensor) -> tuple[Any, Any]:
        """The arguments of the samples `index` (None: all), with `hidden` as their hidden states."""
        leaves, structure = tree_flatten((args, kwargs))
        for position, dimension in enumerate(self.dimensions):
            if position == self.hidden:
                leaves[position] = hidden
            # A model may leave out a mask in a pass in which it would mask nothing.
            elif dimension is not None and index is not None and leaves[position] is not None:
                leaves[position] = leaves[position].index_select(dimension, index)
        return tree_unflatten(leaves, structure)

    def returned_states(self, output: Any) -> Tensor:
        """The hidden states in a block's output."""
        states: Tensor = output[0] if self.returned else output
        return states

    def output(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """`hidden` as a block's output, with None for the other entries of a tuple."""
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


def probe_batch_arguments(
    model: nn.Module, blocks: nn.ModuleList | nn.Sequential, inputs: Callable[[int], Mapping[str, Tensor]]
) -> list[BatchArguments]:
    """Run `model(**inputs(n))` for two batch sizes n and compare the arguments of each block.

    Raises:
        InputError: an argument mixes the batch with another dimension, or a block does not return hidden states of its
            input's shape.
    """
    small, large = (_recorded(model, blocks, inputs(size)) for size in _PROBES)
    return [_compare(position, small[position], large[position]) for position in range(len(blocks))]


def _recorded(
    model: nn.Module, blocks: nn.ModuleList | nn.Sequential, inputs: Mapping[str, Tensor]
) -> dict[int, _Call]:
    """The arguments and the output of each block in a pass."""
    calls: dict[int, _Call] = {}

    def record(position: int, args: Any, kwargs: Any, output: Any) -> None:
        if position in calls:
            raise InputError(
                f"model.block_path: found that the model calls block {position} more than once, expected a list whose "
                "blocks it calls once each"
            )
        calls[position] = (tree_flatten((args, kwargs))[0], output)

    hooks = [
        block.register_forward_hook(lambda _, *call, position=position: record(position, *call), with_kwargs=True)
        for position, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            model(**_with_padding(inputs))
    except InputError:
        raise
    except Exception as error:  # Whatever a model raises when given another model's inputs.
        raise InputError(
            f"model.path: {type(model).__name__} cannot take the data's inputs: {one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != len(blocks):
        raise InputError(
            f"model.block_path: the model called {len(calls)} of the {len(blocks)} blocks found, expected all"
        )
    return calls


def _with_padding(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` with the last token masked, since models may pass no masks to their blocks for texts without padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(inputs)
    return {**inputs, "attention_mask": torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], dim=1)}


def _compare(block: int, small: _Call, large: _Call) -> BatchArguments:
    (leaves, output), (of_more, _) = small, large
    dimensions = tuple(_batch_dimension(block, *pair) for pair in zip(leaves, of_more, strict=True))
    hidden = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    if hidden is None or dimensions[hidden] != 0:
        raise InputError(f"model.path: block {block} is not given hidden states with the batch as first dimension")
    returned = len(output) if isinstance(output, tuple) else 0
    states, *others = output if returned else [output]
    if not isinstance(states, Tensor) or states.shape != leaves[hidden].shape:
        raise InputError(f"model.path: block {block} does not return hidden states of the shape it is given")
    if any(isinstance(extra, Tensor) for extra in others):
        raise InputError(f"model.path: block {block} returns tensors beside its hidden states, expected none")
    return BatchArguments(dimensions, hidden, returned)


def _batch_dimension(block: int, small: Any, large: Any) -> int | None:
    if not isinstance(small, Tensor) or small.shape == large.shape:
        return None
    pairs = list(zip(small.shape, large.shape, strict=True))
    changed = [dimension for dimension, pair in enumerate(pairs) if pair[0] != pair[1]]
    if len(changed) == 1 and pairs[changed[0]] == _PROBES:
        return changed[0]
    raise InputError(
        f"model.path: an argument of block {block} has shape {tuple(small.shape)} for {_PROBES[0]} samples and "
        f"{tuple(large.shape)} for {_PROBES[1]}, expected one dimension equal to the number of samples"
    )

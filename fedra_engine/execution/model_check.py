"""Check before training, on two samples, that the sweep computes what the clients' sub-models would.

Where nothing is computed, as on the meta device, there is nothing to check.

A model's structure does not tell whether blocks can be left out, nor in which order a Linear gets its samples. A model
with unusual blocks would be trained wrongly without notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_engine.models.foundation import Foundation, cut_to_blocks, replace_module
from fedra_engine.models.quantization import is_quantized
from fedra_engine.runtime.errors import InputError, one_line
from fedra_kernels.dispatch import nothing_runs

ModelInputs = Mapping[str, Tensor]
TrialPass = Callable[[ModelInputs, Tensor, NDArray[np.int64]], Tensor]
"""Features of `inputs`, shared out evenly to clients with `slots` [clients, blocks] of `adapters` [rows, slot size]."""

OF_MODELS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model raises that cannot be swept. Others, as of a kernel that does not compile, are not the model's fault."""


def nearly_equal(found: Tensor, expected: Tensor, *, quantized: bool = False, many_blocks: bool = False) -> bool:
    """Whether two results are the same but for rounding, which a wrong one is far from.

    They may be farther apart if they come from `quantized` layers, some of which round their inputs, or in half
    precision from `many_blocks` that were computed in different ways: rounding grows from block to block. How much
    farther is a guess.
    """
    if found.shape != expected.shape:
        return False
    half = expected.dtype in (torch.bfloat16, torch.float16)
    tolerance = 1e-1 if half and many_blocks else 3e-2 if quantized or half else 1e-4
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def nearly_same_change(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether two results of a block on the hidden states `before` are the same but for rounding.

    Beside large hidden states a wrong change would not show; of theirs only the rounding is allowed. Where nothing is
    computed, only the shapes are compared.
    """
    if found.shape != expected.shape:
        return False
    if nothing_runs(found.device):
        return True
    tolerance = 3e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-4
    allowed = tolerance * (expected - before).abs().max() + 2 * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool((found - expected).abs().max() <= allowed)


@torch.no_grad()
def check_sweep(foundation: Foundation, trial: TrialPass, inputs: ModelInputs, *, cuts: bool = True) -> None:
    """Check a sweep of two clients, the second of which lacks the first block, against what it must give.

    Args:
        trial: makes a pass of its sweep.
        inputs: the model's inputs for two samples.
        cuts: also compare with a model without the first block.

    Raises:
        InputError: features are not finite, logits are not the head's output for the features, the cut model differs
            from the sweep, or an adapter acts on another client's sample.
    """
    if nothing_runs(foundation.device):
        return
    inputs = foundation.task.shortened(inputs)
    layout, norms = foundation.head_layout, foundation.head_layout.norm_parameters(foundation.initial_heads()[0])
    equal = partial(nearly_equal, quantized=is_quantized(foundation.model))
    depth, kind = foundation.depth, type(foundation.model).__name__
    slots = np.arange(2 * depth).reshape(2, depth)
    slots[1, 0] = -1
    adapters = torch.zeros(2 * depth, foundation.adapter_layout.size)
    features = _attempt(foundation, "be swept", lambda: trial(inputs, adapters, slots))
    if not features.isfinite().all():
        raise InputError(
            f"model.path: found a {kind} that gives values which are not finite, expected whole weights, or another "
            "model.dtype"
        )
    scaled = layout.scaled(features, norms).to(features.dtype)
    if not equal(foundation.head(scaled[:1]), foundation.model(**inputs).logits[:1]):
        raise InputError(
            f"model.path: found a {kind} that does not return what its {foundation.head_path} gives as logits, "
            "expected a Linear to make them"
        )
    if cuts:
        cut = cut_to_blocks(foundation, range(1, depth))
        replace_module(cut, foundation.head_path, nn.Identity())
        expected = _attempt(foundation, "do without its first block", lambda: cut(**inputs).logits)
        if not equal(scaled[1:], expected[1:]):
            raise InputError(
                f"model.path: found a {kind} that computes something else when its first block is cut off than when a "
                "sample skips it, expected one block's output to be the next one's input"
            )
    for client, of_other in enumerate(adapters.split(depth)[::-1]):
        # NaN stays NaN whatever it is added to or multiplied by, even zero.
        of_other.fill_(torch.nan)
        if not equal(trial(inputs, adapters, slots)[client], features[client]):
            raise InputError(
                f"lora.target_modules: found a target that is given samples of all clients at once by a {kind}, "
                "expected targets that are given one sample after another"
            )
        of_other.zero_()


@torch.no_grad()
def check_norm(foundation: Foundation, norm: nn.Module, trial: TrialPass, inputs: ModelInputs) -> None:
    """Check that scaling and shifting the head's inputs equals doing so in `norm`, whose scale is 1 and shift 0.

    `norm` is that of the model that `trial` runs.

    Raises:
        InputError: the two differ.
    """
    if nothing_runs(foundation.device):
        return
    inputs, layout = foundation.task.shortened(inputs), foundation.head_layout
    adapters, slots = torch.zeros(foundation.depth, foundation.adapter_layout.size), np.arange(foundation.depth)[None]
    plain = _attempt(foundation, "be swept", lambda: trial(inputs, adapters, slots))
    kept = {name: parameter.data for name, parameter in norm.named_parameters()}
    drawn = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.rand(len(parameter), generator=drawn).add_(0.5).to(parameter)
    moved = trial(inputs, adapters, slots)
    norms = dict(norm.named_parameters())
    fits = layout.features % layout.norm == 0 and nearly_equal(layout.scaled(plain, norms), moved)
    for name, values in kept.items():
        norm.get_parameter(name).data = values
    if not fits:
        raise InputError(
            f"lora.modules_to_save: found {foundation.norm_path}, whose output is not what the head reads, expected "
            "the norm after the last block, or none"
        )


def _attempt(foundation: Foundation, what: str, compute: Callable[[], Tensor]) -> Tensor:
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except OF_MODELS as error:
        kind = type(foundation.model).__name__
        raise InputError(f"model.path: found a {kind} that cannot {what}: {one_line(error)}") from error

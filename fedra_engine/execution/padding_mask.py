"""Whether a model needs an attention mask although its texts are padded on the right.

A causal model does not: no token reads what follows it. Without a mask its attention can be flash attention, which on a
GPU takes only the causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedra_engine.execution.model_check import nearly_equal
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.foundation import Foundation
from fedra_kernels.dispatch import nothing_runs

MASK = "attention_mask"


@torch.no_grad()
def needs_padding_mask(foundation: Foundation, arguments: BatchArguments, inputs: Mapping[str, Tensor]) -> bool:
    """Whether logits before the padding depend on it, or on the mask, tried on the `inputs` of a few samples.

    Nothing can be tried where nothing is computed, as on the meta device; then the answer is yes.

    Args:
        arguments: of the first block.
    """
    inputs = dict(foundation.task.shortened(inputs))
    mask = inputs.get(MASK)
    if mask is None or mask.shape[1] < 2 or nothing_runs(foundation.device):
        return True
    padding = getattr(foundation.model.config, "pad_token_id", None)
    if "input_ids" in inputs and padding is not None:
        ids = inputs["input_ids"]
        if (ids[~mask.bool()] != padding).any():
            # A model that looks for the last token of a text takes these for text.
            return True
        inputs["input_ids"] = torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], padding)], dim=1)
    mask = inputs[MASK] = torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], dim=1)
    is_text = mask.bool()

    def logits(inputs: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = foundation.model(**inputs).logits
        return found[is_text] if found.dim() == 3 else found

    spoilt = False

    def spoil(block: nn.Module, args: Any, kwargs: Any) -> Any:
        nonlocal spoilt
        states = arguments.hidden_states(args, kwargs)
        if states.shape[:2] != is_text.shape:
            # The model has added tokens.
            return None
        spoilt = True
        # Any other finite values: NaN would pass even a mask, as zero times NaN.
        return arguments.select(args, kwargs, None, states.where(is_text[:, :, None], 1 - 3 * states))

    first: Any = foundation.blocks[0]
    with_mask = logits(inputs)
    del inputs[MASK]
    try:
        without = logits(inputs)
        hook = first.register_forward_pre_hook(spoil, with_kwargs=True)
        try:
            found = logits(inputs)
        finally:
            hook.remove()
    except (AttributeError, TypeError, ValueError):  # It cannot do without.
        return True
    return not (spoilt and torch.equal(found, without) and nearly_equal(without, with_mask))

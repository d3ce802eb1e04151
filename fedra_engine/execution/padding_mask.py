"""Which batches of texts, padded on the right, need an attention mask.

In a causal model no token reads what follows it, so none does. Without a mask its attention can be flash attention,
which on a GPU takes only the causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedra_engine.execution.model_check import OF_MODELS, nearly_equal
from fedra_engine.models.batch_arguments import BatchArguments
from fedra_engine.models.foundation import Foundation
from fedra_kernels.dispatch import nothing_runs

IDS, MASK = "input_ids", "attention_mask"
MaskUse = Literal["never", "padded", "always"]
"""Whether a model needs a mask never, for batches with padding, or also, full of ones, for batches without."""
_MOST_TOKENS = 32
"""Of the tried texts. Padding lies behind 1, 2, 4, … of them, so that any token has some near it and some far away."""


@torch.no_grad()
def find_mask_use(foundation: Foundation, arguments: BatchArguments, inputs: Mapping[str, Tensor]) -> MaskUse:
    """Try what logits of the `inputs` of a few samples depend on.

    Nothing can be tried where nothing is computed, as on the meta device; then the answer is `padded`.

    Args:
        arguments: of the first block.
    """
    ids = inputs.get(IDS)
    if ids is None or ids.shape[1] < 2 or nothing_runs(foundation.device):
        return "padded"
    mask = inputs.get(MASK, torch.ones_like(ids)).bool()
    padding = getattr(foundation.model.config, "pad_token_id", None)
    trial = _Trial(foundation, arguments, ids[:, :_MOST_TOKENS], padding)
    use = trial.of_batches_without_padding()
    # A model that looks for the last token of a text takes other padding for text.
    if use != "padded" or (padding is not None and (ids[~mask] != padding).any()):
        return use
    lengths = [2**power for power in range(_MOST_TOKENS) if 2**power < trial.tokens]
    return "never" if all(trial.needs_no_mask(length) for length in [*lengths, trial.tokens - 1]) else "padded"


class _Trial:
    """Passes of the model over a few tokens [samples, tokens], with and without a mask."""

    def __init__(self, foundation: Foundation, arguments: BatchArguments, ids: Tensor, padding: int | None) -> None:
        self._foundation, self._arguments, self._ids, self._padding = foundation, arguments, ids, padding

    @property
    def tokens(self) -> int:
        """The tokens of each sample."""
        return self._ids.shape[1]

    def of_batches_without_padding(self) -> MaskUse:
        """`always` if no mask is something else than a mask of ones, also where the text has the padding token."""
        ids = self._ids.clone()
        if self._padding is not None:
            ids[:, self.tokens // 2] = self._padding
        everything = torch.ones_like(ids, dtype=torch.bool)
        try:
            expected = self._logits(ids, everything, masked=True)
        except torch.OutOfMemoryError:
            raise
        except OF_MODELS:  # It takes no mask, or other texts.
            return "padded"
        found = self._logits_without_mask(ids, everything)
        return "always" if found is None or not nearly_equal(found, expected) else "padded"

    def needs_no_mask(self, length: int) -> bool:
        """Whether logits of texts of `length` tokens depend neither on the mask nor on what the padding holds."""
        is_text = (torch.arange(self.tokens, device=self._ids.device) < length).expand_as(self._ids)
        ids = self._ids if self._padding is None else self._ids.where(is_text, self._padding)
        spoilt = False

        def spoil(block: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal spoilt
            states = self._arguments.hidden_states(args, kwargs)
            if states.shape[:2] != is_text.shape:
                # The model has added tokens.
                return None
            spoilt = True
            # Any other finite values: NaN would pass even a mask, as zero times NaN.
            return self._arguments.select(args, kwargs, None, states.where(is_text[:, :, None], 1 - 3 * states))

        try:
            with_mask = self._logits(ids, is_text, masked=True)
        except torch.OutOfMemoryError:
            raise
        except OF_MODELS:  # It may want a certain token at the end.
            return False
        without = self._logits_without_mask(ids, is_text)
        if without is None or not nearly_equal(without, with_mask):
            return False
        first: Any = self._foundation.blocks[0]
        hook = first.register_forward_pre_hook(spoil, with_kwargs=True)
        try:
            found = self._logits_without_mask(ids, is_text)
        finally:
            hook.remove()
        return spoilt and found is not None and torch.equal(found, without)

    def _logits_without_mask(self, ids: Tensor, is_text: Tensor) -> Tensor | None:
        """None if the model cannot do without."""
        try:
            return self._logits(ids, is_text, masked=False)
        except torch.OutOfMemoryError:
            raise
        except OF_MODELS:
            return None

    def _logits(self, ids: Tensor, is_text: Tensor, *, masked: bool) -> Tensor:
        """Those of the samples, or of the tokens that are text; LookupError if the model has added tokens to these."""
        inputs = {IDS: ids, MASK: is_text.long()} if masked else {IDS: ids}
        found: Tensor = self._foundation.model(**inputs).logits
        return found[is_text] if found.dim() == 3 else found

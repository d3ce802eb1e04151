"""Preprocessed texts: what executors need of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedra_engine.data.samples import Batch, LearntTokens
from fedra_engine.data.stored_rows import StoredRows, copy_async
from fedra_engine.data.tokenization import TokenRows
from fedra_engine.runtime.files import content_hash
from fedra_engine.runtime.randomness import SampleDraws

NOT_LEARNT = -100
"""The label of a token that is not to be learnt (that of torch's cross entropy)."""


class TokenSamples:
    """Tokenized texts.

    A batch is cut to the longest of its texts, unless every one is to have the same length: LoRA dropout counts rows,
    so a client's masks would depend on whose texts share the batch.
    """

    def __init__(
        self, tokens: TokenRows, domains: Tensor, stored: Tensor, labels: Tensor | None, *, cut: bool = True
    ) -> None:
        """Keep `tokens` where they are.

        Args:
            tokens: of all stored texts.
            domains: int64 [samples].
            stored: int64 [samples], each sample's row in `tokens`.
            labels: int64 [samples], classes; None where the texts themselves are to be learnt.
            cut: whether batches are cut to their longest text.
        """
        self.domains = domains
        self._tokens = tokens
        self._stored = stored
        self._classes = labels
        self._cut = cut
        self._class_rows = None if labels is None else StoredRows([labels])

    def __len__(self) -> int:
        return len(self.domains)

    @property
    def labels(self) -> Tensor:
        """Classes, int64 [samples]; or what is to be learnt of every text, int64 [samples, max_length]."""
        if self._classes is not None:
            return self._classes
        return self._learnt(self._stored, self._tokens.ids.gather(self._stored, torch.device("cpu")).long())

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each text; see `Samples`."""
        return self._tokens.lengths[self._stored] if self._cut else None

    def digest(self) -> str:
        """Of tokens, their numbers and those of the prompts; see `Samples`."""
        numbers = (of[self._stored].numpy().tobytes() for of in (self._tokens.lengths, self._tokens.prompts))
        content = b"".join([self._tokens.ids.digest(self._stored).encode(), *numbers])
        return content_hash(content).hexdigest()

    def inputs(self, rows: Tensor, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [rows, tokens of the longest]; `dtype` is for inputs that are no tokens."""
        return self.batch(rows, device, dtype).inputs

    def batch(
        self, rows: Tensor, device: torch.device | str, dtype: torch.dtype, draws: SampleDraws | None = None
    ) -> Batch:
        """Inputs and labels of the samples `rows`, which nothing changes; see `Samples`."""
        device = torch.device(device)
        stored = self._stored[rows]
        longest = int(self._tokens.lengths[stored].numpy().max()) if self._cut else None
        ids = self._tokens.ids.gather(stored, device)[:, :longest].long()
        lengths = copy_async(self._tokens.lengths[stored], device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._class_rows is not None:
            return Batch(inputs, self._class_rows.gather(rows, device))
        return Batch(inputs, self._learnt(stored, ids), self._learnt_tokens(stored))

    def _learnt_tokens(self, stored: Tensor) -> LearntTokens:
        """Where `_learnt` marks nothing, except at first tokens."""
        first = self._tokens.prompts[stored].clamp(min=1).numpy()
        counts = np.maximum(self._tokens.lengths[stored].numpy() - first, 0)
        samples = np.repeat(np.arange(len(stored)), counts)
        within = np.arange(len(samples)) - (counts.cumsum() - counts)[samples]
        return LearntTokens(samples, first[samples] + within)

    def _learnt(self, stored: Tensor, ids: Tensor) -> Tensor:
        """`ids` [rows, tokens] of the texts `stored` with `NOT_LEARNT` for prompts and filling."""
        lengths, prompts = (
            copy_async(of[stored], ids.device)[:, None] for of in (self._tokens.lengths, self._tokens.prompts)
        )
        position = torch.arange(ids.shape[1], device=ids.device)
        return ids.masked_fill((position < prompts) | (position >= lengths), NOT_LEARNT)
